"""Time per token while sampling, at a given length of completion, against the bytes that a step has to read.

Every peer goes through `model.generate`, which is how it is used. A length is not generated in full: a full cache of
that length is filled with random keys and values, and PTE's cache is driven there by calls of many tokens, which evict
as decoding does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from ..common.arithmetic import kv_bytes_per_token
from ..common.models import LINEARS, shape_config, shaped_base, with_lora, with_pte
from ..common.session import Row, Session, memory_bytes, release
from ..common.timing import Spread, synchronize

PEERS = ("base_dynamic", "lora", "pte", "pte_reference", "pte_triton", "base_static", "pte_static")
"""In this order: compiled peers take longest to warm up and come when the others are done."""
COMPILED = ("base_static", "pte_static")
"""`generate` compiles these on a GPU."""
_COMPILE_SECONDS = 25


@dataclass(frozen=True)
class DecodeCase:
    """One shape, batch and length."""

    shape: str
    batch: int
    length: int
    """Completion tokens before the first one that is timed."""
    window: int
    prompt: int
    rank: int
    evict_ratio: float = 0.25
    tokens: int = 16
    """Tokens that are timed in one go; peers that evict take as many goes as see two evictions."""

    @property
    def tokens_per_eviction(self) -> int:
        """``m``."""
        return max(1, int(self.evict_ratio * self.window))


def cases(session: Session) -> list[DecodeCase]:
    """All cases of this session, those of one shape together, small batches first."""
    if session.gpu:
        batches, lengths, sizes = (1, 8, 64), (3072, 32768), {"window": 1024, "prompt": 256, "rank": 32}
    else:
        batches, lengths, sizes = (1, 4), (128, 1024), {"window": 64, "prompt": 32, "rank": 8}
    found = []
    for shape in session.shapes:
        if not session.gpu and shape != "tiny":
            # A published shape on a CPU takes seconds for what the tiny one shows in milliseconds.
            published = {"window": 1024, "prompt": 32, "rank": 32}
            found += [DecodeCase(shape, 1, length, **published) for length in (512, 4096)]
        else:
            found += [DecodeCase(shape, batch, length, **sizes) for batch in batches for length in lengths]
    return found


class Clock(StoppingCriteria):
    """Notes when each token of a generation was there, and how often the cache had evicted; stops it when told to."""

    def __init__(self, device: torch.device, tokens: int, cache: Any = None) -> None:
        self.device, self.tokens, self.cache = device, tokens, cache
        self.times: list[float] = []
        self.evictions: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Called by `generate` after every token; it synchronises with the device there anyway."""
        synchronize(self.device)
        self.times.append(time.perf_counter())
        self.evictions.append(getattr(self.cache, "evictions", 0))
        done = len(self.times) > self.tokens
        return torch.full((input_ids.shape[0],), done, device=input_ids.device, dtype=torch.bool)

    def seconds(self) -> tuple[list[float], list[float]]:
        """Seconds of the tokens that evicted nothing, and of those that did; the first token, a prefill, is left out."""
        plain, evicting = [], []
        for index in range(1, len(self.times)):
            evicted = self.evictions[index] > self.evictions[index - 1]
            (evicting if evicted else plain).append(self.times[index] - self.times[index - 1])
        return plain, evicting


def generate(
    model: Any, device: torch.device, rows: torch.Tensor, tokens: int, cache: Any = None, **options: Any
) -> Clock:
    """Sample ``tokens`` tokens after ``rows [B, N]`` and one that is not timed."""
    clock = Clock(device, tokens, cache)
    options = {"max_new_tokens": tokens + 1, **options}
    model.generate(
        input_ids=rows,
        past_key_values=cache,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        top_k=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        pad_token_id=0,
        **options,
    )
    return clock


def measure(session: Session) -> Iterator[Row]:
    """One row per case and peer."""
    by_shape: dict[str, list[DecodeCase]] = {}
    for case in cases(session):
        by_shape.setdefault(case.shape, []).append(case)
    for shapes_left, (shape, group) in zip(range(len(by_shape), 0, -1), by_shape.items(), strict=True):
        reserved = session.budget.left * (1 - 1 / shapes_left)
        base = shaped_base(shape, session.device, session.dtype)
        peers = [peer for peer in PEERS if session.wants(peer)]
        if session.gpu:
            # Putting adapters on takes longer than a case.
            pairs = [(peer, case) for peer in peers for case in _order(group, peer)]
        else:
            # Peers of a case next to each other: a busy minute of the machine falls on all of them.
            pairs = [(peer, case) for case in group for peer in peers]
        yield from _pairs(session, base, pairs, reserved)
        del base
        release(session.device)


def _order(group: list[DecodeCase], peer: str) -> list[DecodeCase]:
    """Compiled peers start with what all shapes can afford."""
    return sorted(group, key=lambda case: (case.length, case.batch)) if peer in COMPILED else group


def _pairs(session: Session, base: Any, pairs: list[tuple[str, DecodeCase]], reserved: float) -> Iterator[Row]:
    """The rows of one shape; ``reserved``: seconds of the budget that belong to the others."""
    model, wrapped_for = base, None
    for peer, case in pairs:
        if session.has("decode", case, peer):
            continue
        reason = _not_tried(session, base, peer, case, reserved)
        if reason is not None:
            yield session.skipped("decode", case, peer, reason)
            continue
        if wrapped_for != peer:
            if model is not base:
                model.unload()
            model, wrapped_for = _PEERS[peer][1](base, case), peer
        yield session.attempt("decode", case, peer, partial(_measure_peer, session, model, peer, case))
        release(session.device)
    if model is not base:
        model.unload()


def _not_tried(session: Session, base: Any, peer: str, case: DecodeCase, reserved: float) -> str | None:
    """Why ``peer`` is left out, or ``None``."""
    if peer == "pte_reference" and not session.gpu:
        return 'same as "pte": impl="auto" is the reference on this device'
    if session.gpu and peer.startswith("pte") and case.length > 4 * case.window and (peer != "pte" or case.batch > 1):
        return "not run: the cache holds the same at every length, which `pte` at batch 1 shows; it takes long to get there"
    reason = _does_not_fit(session, base, peer, case)
    if reason is None and session.budget.left < reserved + (
        _COMPILE_SECONDS if session.gpu and peer in COMPILED else 0
    ):
        reason = "skipped: the rest of the budget is for the other shapes; give --shapes or a larger --budget"
    return reason


def _does_not_fit(session: Session, base: Any, peer: str, case: DecodeCase) -> str | None:
    """Why the case needs more memory than there is, by arithmetic, so that no minute is lost on trying."""
    memory = memory_bytes(session.device)
    if memory is None:
        return None
    weights = sum(weight.numel() * weight.element_size() for weight in base.parameters())
    # A tenth for activations, logits and what the allocator cannot use.
    needed = 1.1 * (weights + case.batch * _slots(peer, case) * kv_bytes_per_token(base.config, base.dtype.itemsize))
    if needed < memory:
        return None
    return f"does not fit: needs about {needed / 2**30:.0f} GiB, the device has {memory / 2**30:.0f}"


def _slots(peer: str, case: DecodeCase) -> int:
    """Cache slots per sequence that a step reads, on average over the steps between evictions."""
    if peer.startswith(("base", "lora")):
        return case.prompt + case.length
    return case.prompt + case.window - case.tokens_per_eviction // 2


def _measure_peer(session: Session, model: Any, peer: str, case: DecodeCase) -> Row:
    with torch.no_grad():
        plain, evicting = _PEERS[peer][0](session, model, case)
    floor = _floor_bytes(model, peer, case)
    step = Spread.of(plain)
    # An eviction costs what its step takes beyond an ordinary one, and serves m tokens.
    extra = max(Spread.of(evicting).median - step.median, 0.0) if evicting else 0.0
    per_token = step.median + extra / case.tokens_per_eviction
    floor_seconds = floor / session.ceilings["bytes_per_second"]
    return {
        "step_seconds": step.row(),
        "eviction_seconds": Spread.of(evicting).row() if evicting else None,
        "seconds_per_token": per_token,
        "tokens_per_second": case.batch / per_token,
        "floor_bytes": floor,
        "share_of_floor": floor_seconds / per_token,
        "impl": _impl(model),
    }


def _impl(model: Any) -> str | None:
    for module in model.modules():
        if hasattr(module, "resolved_impl"):
            return str(module.resolved_impl("default"))
    return None


def _floor_bytes(model: Any, peer: str, case: DecodeCase) -> int:
    """Bytes that one step must read: every weight once (of the embedding, a row per sequence), every slot in use once."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    encoders = sum(
        weight.numel() * weight.element_size()
        for name, weight in model.named_parameters()
        if ".thought_encoder." in name
    )
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters()) - encoders
    if embedding is not head:
        weights -= embedding.numel() * embedding.element_size()
    return weights + case.batch * _slots(peer, case) * kv_bytes_per_token(inner.config, inner.dtype.itemsize)


def _rows(session: Session, model: Any, case: DecodeCase, columns: int) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (case.batch, columns), device=session.device)


def _full_cache(session: Session, model: Any, case: DecodeCase, slots: int) -> DynamicCache:
    """A cache of the base model that holds ``slots`` random tokens."""
    config = shape_config(case.shape)
    cache = DynamicCache(config=config)
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(case.batch, heads, slots, head_dim, device=session.device, dtype=session.dtype)
            for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def _dynamic(session: Session, model: Any, case: DecodeCase) -> tuple[list[float], list[float]]:
    slots = case.prompt + case.length
    rows = _rows(session, model, case, slots + 1)
    cache = _full_cache(session, model, case, slots)
    warm = generate(model, session.device, rows, 2, cache)
    del warm
    seen = cache.get_seq_length()
    rows = _rows(session, model, case, seen + 1)
    return generate(model, session.device, rows, 2 * case.tokens, cache).seconds()


def _pte(session: Session, model: Any, case: DecodeCase) -> tuple[list[float], list[float]]:
    """Through evictions in mid-air: the window is left with half the room that the timed tokens need."""
    cache = model.base_model.new_cache()
    _advance(session, model, case, cache, case.prompt)
    plain: list[float] = []
    evicting: list[float] = []
    target = case.prompt + case.length
    # The first go warms up.
    for go in range(3):
        _advance(session, model, case, cache, target - cache.get_seq_length())
        tokens = min(case.tokens, case.tokens_per_eviction)
        _advance(session, model, case, cache, _tokens_until_room(cache, tokens // 2, case.tokens_per_eviction))
        rows = _rows(session, model, case, cache.get_seq_length() + 1)
        found = generate(model, session.device, rows, tokens, cache).seconds()
        if go:
            plain += found[0]
            evicting += found[1]
    return plain, evicting


def _tokens_until_room(cache: Any, room: int, evict: int) -> int:
    """Tokens to write until the window has ``room`` left."""
    return (cache.room - room) % evict


def _advance(session: Session, model: Any, case: DecodeCase, cache: Any, tokens: int) -> None:
    """Write ``tokens`` tokens, some thousands over the batch at a time, so that activations stay small."""
    piece = max(case.tokens_per_eviction, 16384 // case.batch)
    first = cache.get_seq_length() == 0
    while tokens > 0:
        # The first call is the prompt, whole.
        length = tokens if first else min(tokens, piece)
        model(input_ids=_rows(session, model, case, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens -= length
        first = False


def _static(session: Session, model: Any, case: DecodeCase) -> tuple[list[float], list[float]]:
    """All slots of the length are allocated and read at every step, so a few tokens after the prompt tell."""
    rows = _rows(session, model, case, case.prompt)
    options = {"cache_implementation": "static", "max_new_tokens": case.length}
    generate(model, session.device, rows, 3, **options)  # Compiles on a GPU.
    return generate(model, session.device, rows, 2 * case.tokens, **options).seconds()


def _pte_static(session: Session, model: Any, case: DecodeCase) -> tuple[list[float], list[float]]:
    """From the prompt through the window and two evictions; the tokens after the window was filled are kept.

    A static cache does not say when it evicts: every ``m``-th of these tokens does.
    """
    rows = _rows(session, model, case, case.prompt)
    evict = case.tokens_per_eviction
    options = {"cache_implementation": "static"}
    generate(model, session.device, rows, 3, **options)
    plain, evicting = generate(model, session.device, rows, case.window + 2 * evict + 2, **options).seconds()
    timed = plain[-2 * evict :] if not evicting else plain
    if evicting:
        return timed, evicting
    slowest = sorted(range(len(timed)), key=timed.__getitem__)[-2:]
    return [seconds for index, seconds in enumerate(timed) if index not in slowest], [timed[i] for i in slowest]


def _base(base: Any, case: DecodeCase) -> Any:
    return base


def _lora(base: Any, case: DecodeCase) -> Any:
    return with_lora(base, case.rank, LINEARS, autocast=False).eval()


def _adapted(base: Any, case: DecodeCase, **fields: Any) -> Any:
    sizes = {
        "r": case.rank,
        "num_global_tokens": case.rank,
        "cache_window": case.window,
        "evict_ratio": case.evict_ratio,
    }
    return with_pte(base, autocast=False, **sizes, **fields).eval()


_PEERS: dict[str, tuple[Callable[..., tuple[list[float], list[float]]], Callable[..., Any]]] = {
    "base_dynamic": (_dynamic, _base),
    "lora": (_dynamic, _lora),
    "pte": (_pte, _adapted),
    "pte_reference": (_pte, partial(_adapted, impl="reference")),
    "pte_triton": (_pte, partial(_adapted, impl="triton")),
    "base_static": (_static, _base),
    "pte_static": (_pte_static, _adapted),
}
