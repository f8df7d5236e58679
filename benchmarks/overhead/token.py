"""What a token costs while decoding, beside the base model and LoRA on the same linears: launches, CPU time, own Python calls.

Eager, through `model.generate`, on one CPU, peers in one run and in turns. A number per token is the difference of a long and a short
generation, so that the prefill does not count; evictions do, as often as they happen. Launches are operations that are not views (on a
GPU a kernel each); own calls are calls of Python functions of `peft_pte`. The shape is that of SmolLM2-135M with fewer layers; tokens per
second are those of SmolLM2-135M-Instruct itself, on all cores, by the clock on the wall.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..common.accounting import Launches
from ..common.models import LINEARS, shaped_base, with_lora, with_pte
from ..common.records import Record
from ..common.session import Session

PEERS = ("base", "lora", "pte", "pte_static")
PUBLISHED = "SmolLM2-135M-Instruct"
PROMPT, WINDOW, RANK = 16, 64, 32
# From a window that is full on, and as many evictions in each.
COUNTED = (WINDOW, 2 * WINDOW)
AT_MOST = {"launches": 0.9, "own_calls": 150, "seconds": 1.0}
"""For `pte`; launches and seconds relative to LoRA."""


@dataclass(frozen=True)
class TokenCase:
    """One batch."""

    batch: int
    layers: int = 4
    shape: str = "SmolLM2-135M"
    prompt: int = PROMPT
    window: int = WINDOW
    rank: int = RANK


def measure(session: Session) -> Iterator[Record]:
    """One row per batch and peer; a batch of which a peer is missing is taken whole."""
    for batch in (1,) if session.quick else (1, 32):
        case = TokenCase(batch, layers=2 if session.quick else 4)
        if not session.missing("token", case, PEERS):
            continue
        models = {peer: build(case, peer) for peer in PEERS if session.wants(peer)}
        times = seconds(models, case, 1 if session.quick else 8)
        for peer, model in models.items():
            counts = {"launches": launches(model, peer, case), "own_calls": own_calls(model, peer, case)}
            limits = AT_MOST if peer == "pte" else None
            yield {**session.where("token", case, peer), **counts, "seconds_per_token": times[peer], "at_most": limits}
    if not session.quick:
        yield from whole_model(session)


def whole_model(session: Session) -> Iterator[Record]:
    """Tokens per second of all rows together, with all cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    for batch in (1, 32):
        case = TokenCase(batch, layers=30, shape=PUBLISHED)
        if not session.missing("token", case, PEERS):
            continue
        models = {peer: build(case, peer) for peer in PEERS if session.wants(peer)}
        for peer, found in seconds(models, case, 3, time.perf_counter).items():
            rate = {"threads": torch.get_num_threads(), "tokens_per_second": batch / found}
            yield {**session.where("token", case, peer), **rate}
    torch.set_num_threads(threads)


def build(case: TokenCase, peer: str) -> Any:
    """The model of a peer, in evaluation mode."""
    if case.shape == PUBLISHED:
        from examples.common import smollm2_folder

        base: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    else:
        base = shaped_base(case.shape, "cpu", layers=case.layers)
    if peer == "lora":
        base = with_lora(base, RANK, LINEARS)
    elif peer != "base":
        base = with_pte(base, r=RANK, num_global_tokens=RANK, cache_window=WINDOW)
    return base.eval()


def generate(model: Any, peer: str, case: TokenCase, tokens: int) -> None:
    """Decode so many ``tokens`` greedily."""
    ids = torch.randint(1, 2048, (case.batch, PROMPT), generator=torch.Generator().manual_seed(0))
    static = {"cache_implementation": "static", "disable_compile": True} if peer == "pte_static" else {}
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths, **static
    )


def per_token(count: Callable[[int], float], fewer: int = COUNTED[0], more: int = COUNTED[1]) -> float:
    """``count`` of a generation, by the tokens that a longer one has beyond a shorter one."""
    return (count(more) - count(fewer)) / (more - fewer)


def launches(model: Any, peer: str, case: TokenCase) -> float:
    """Operations of a token that are not views."""

    def count(tokens: int) -> int:
        with Launches() as found:
            generate(model, peer, case, tokens)
        return found.number

    return per_token(count)


def own_calls(model: Any, peer: str, case: TokenCase) -> float:
    """Calls of Python functions of the package at a token."""
    import peft_pte

    folder, found = str(Path(peft_pte.__file__).parent), [0]

    def note(frame: Any, event: str, argument: Any) -> None:
        # What checks shapes is there in tests alone.
        path = frame.f_code.co_filename
        found[0] += event == "call" and path.startswith(folder) and not path.endswith("shapes.py")

    def count(tokens: int) -> int:
        found[0] = 0
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            generate(model, peer, case, tokens)
        finally:
            sys.setprofile(before)
        return found[0]

    return per_token(count)


def seconds(
    models: dict[str, Any], case: TokenCase, repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Time for a token, of the process by default: of the short and of the long generation the best of several, peers in turn."""
    best: dict[tuple[str, int], float] = {}
    for repeat in range(repeats + 1):
        for tokens in COUNTED:
            for peer, model in models.items():
                start = clock()
                generate(model, peer, case, tokens)
                if repeat:  # The first warms up.
                    key = peer, tokens
                    best[key] = min(best.get(key, float("inf")), clock() - start)
    return {
        peer: per_token(lambda tokens, peer=peer: best[peer, tokens])  # type: ignore[misc]
        for peer in models
    }
