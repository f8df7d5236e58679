"""What a choice costs beside an eviction: by policy, launches and CPU time of an eviction while decoding, and of scoring.

One thread, policies in turns, the best of several. Decoding: what an eviction of a layer takes beyond a step without one, its choice and its
encoding apart. Scoring: a call of several windows, forward and backward, beside that of a sliding window, whose evictions come several to a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from peft_pte.cache.heads import ChoosingLayer
from peft_pte.cache.store import ThoughtLayer
from peft_pte.method.encoder import PTEEncoder

from ..common.accounting import Launches
from ..common.models import shaped_base, with_pte
from ..common.records import Record
from ..common.session import Session

SHAPE, LAYERS, BATCH, PROMPT, WINDOW, RANK = "SmolLM2-135M", 2, 2, 64, 128, 32
LENGTH = 4 * WINDOW
REPEATS = 3
# Three KV heads, of which the first looks back.
POLICIES: dict[str, dict[str, Any]] = {
    "sliding_window": {},
    "random": {},
    "key_diff": {},
    "attention": {"queries": 8},
    "head_budget": {"queries": 8, "importance": [[3.0, 1.0, 1.0]] * LAYERS},
}


KEY = ("policy",)


class Clock:
    """Adds up what calls of a method take, launches or seconds."""

    def __init__(self, owner: Any, name: str, launches: bool) -> None:
        self.owner, self.name, self.launches = owner, name, launches
        self.own = owner.__dict__[name]
        self.spent: list[float] = []

    def __enter__(self) -> Clock:
        own, launches, spent = self.own, self.launches, self.spent

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            if not launches:
                result = own(*args, **kwargs)
                spent.append(time.process_time() - start)
                return result
            with Launches() as found:
                result = own(*args, **kwargs)
            spent.append(found.number)
            return result

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(self.owner, self.name, self.own)


def model(policy: str) -> Any:
    """The model of a policy."""
    base = shaped_base(SHAPE, "cpu", layers=LAYERS)
    adapter = {"r": RANK, "num_global_tokens": RANK, "cache_window": WINDOW}
    return with_pte(base, **adapter, eviction=policy, eviction_options=POLICIES[policy]).eval()


def ids() -> Tensor:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 2048, (BATCH, PROMPT + LENGTH), generator=generator)


@torch.no_grad()
def decoding(adapted: Any, policy: str, launches: bool) -> dict[str, float]:
    """What an eviction of a layer takes: what leaves is chosen and copied, then encoded; per layer."""
    tokens = ids()
    cache = adapted.base_model.new_cache()
    adapted(tokens[:, : PROMPT + WINDOW + WINDOW], past_key_values=cache, prompt_length=PROMPT)
    owner = ThoughtLayer if policy == "sliding_window" else type(cache.layers[0])
    owner = owner if "lose" in owner.__dict__ else ChoosingLayer
    with Clock(owner, "lose", launches) as lost, Clock(PTEEncoder, "forward_rows", launches) as encoded:
        for column in range(PROMPT + 2 * WINDOW, PROMPT + 3 * WINDOW):
            adapted(tokens[:, column : column + 1], past_key_values=cache)
    return {"choose": min(lost.spent), "encode": min(encoded.spent), "evictions": len(lost.spent) / LAYERS}


def scoring(adapted: Any, launches: bool) -> float:
    """A call of four windows of thoughts, forward and backward."""
    tokens = ids()
    counted = Launches() if launches else None
    start = time.process_time()
    with counted or nullcontext():
        adapted(input_ids=tokens, labels=tokens, prompt_length=PROMPT).loss.backward()
    seconds = time.process_time() - start
    adapted.zero_grad()
    return seconds if counted is None else counted.number


def measure(session: Session) -> Iterator[Record]:
    """One record per policy; if one is missing, of all of them, as they take turns."""
    if all(session.results.has({"policy": policy}) for policy in POLICIES):
        return
    models = {policy: model(policy) for policy in POLICIES}
    found: dict[str, dict[str, float]] = {policy: {} for policy in POLICIES}
    for policy, adapted in models.items():
        counts = decoding(adapted, policy, launches=True)
        found[policy] = {
            "choose_launches": counts["choose"],
            "encode_launches": counts["encode"],
            "score_launches": scoring(adapted, launches=True),
        }
    for _ in range(1 if session.quick else REPEATS):
        for policy, adapted in models.items():
            times = {**decoding(adapted, policy, launches=False), "score": scoring(adapted, launches=False)}
            for name in ("choose", "encode", "score"):
                key = f"{name}_seconds"
                found[policy][key] = min(found[policy].get(key, float("inf")), times[name])
    for policy, numbers in found.items():
        held = models[policy].base_model.new_cache()
        with torch.no_grad():
            models[policy](ids()[:, : PROMPT + 2 * WINDOW], past_key_values=held, prompt_length=PROMPT)
        yield {
            "policy": policy,
            **{name: round(number, 6) for name, number in numbers.items()},
            "cache_bytes": held.nbytes,
        }
