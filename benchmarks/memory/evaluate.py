"""Recall by distance, with its controls: swapped evictions, and a state that stays what it was at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.state import Evicted

from ..common.intervals import share
from .model import follows, recall
from .task import PROMPT, Traces, held, make_traces

EVALUATION_SEED = 777_000
"""One set of traces for every run; no seed of a training comes near it."""
MICRO_BATCH = 256
BIN = 0.5
"""Width of a bin of the curve over distance, in windows."""


def buckets(traces: Traces, window: int, evict: int, layers: int, far: int | None = None) -> dict[str, Tensor]:
    """Which facts ``[B, F]`` are asked for at what distance.

    ``beyond_relay`` is the honest one: further than layers x window, no kept token can have heard of the fact from one
    that had (or further than ``far``, to compare windows by the same facts). It overlaps the others; the four before it do not overlap.
    """
    distance = traces.distance
    here = held(traces.stated, traces.asked, window, evict)
    windows = distance / window
    return {
        "window": here,
        "evicted_to_1.5": ~here & (windows <= 1.5),
        "1.5_to_2.5": (windows > 1.5) & (windows <= 2.5),
        "over_2.5": windows > 2.5,
        "evicted": ~here,
        "beyond_relay": distance > (layers * window if far is None else far),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    length: int,
    batch: int,
    window: int,
    evict: int,
    layers: int,
    far: int | None = None,
    shift: int = 0,
) -> dict[str, Any]:
    """Recall of ``model`` on ``batch`` traces of ``length`` thoughts, by bucket and by distance in half windows."""
    device = next(model.parameters()).device
    traces = make_traces(batch, length, torch.Generator().manual_seed(EVALUATION_SEED + length), shift)
    adapted = hasattr(model, "peft_config")
    right, running = [], []
    for start in range(0, batch, MICRO_BATCH):
        part = Traces(**{name: rows[start : start + MICRO_BATCH] for name, rows in vars(traces).items()}).to(device)
        if adapted:
            logits = model(input_ids=part.input_ids, labels=part.answers, prompt_length=PROMPT).logits
        else:
            logits = model(input_ids=part.input_ids, use_cache=False).logits
        right.append(recall(logits, part).cpu())
        running.append(follows(logits, part).cpu())
    hits = torch.cat(right)
    bins = (traces.distance / (BIN * window)).ceil().long()
    return {
        "length": length,
        "traces": batch,
        "buckets": {name: share(hits[chosen]) for name, chosen in buckets(traces, window, evict, layers, far).items()},
        "all": share(hits),
        "by_distance": [
            {"up_to_windows": BIN * int(index), **share(hits[bins == index])} for index in bins.unique().tolist()
        ],
        "running": share(torch.cat(running)),
    }


def _encoders(model: nn.Module) -> list[PTEEncoder]:
    return [module for module in model.modules() if isinstance(module, PTEEncoder)]


@contextmanager
def swapped_evictions(model: nn.Module) -> Iterator[None]:
    """Within the block, every sequence's encoders read the keys and values that its neighbour in the batch lost."""

    def swap(encoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        adapter, state, evicted, *times = args
        return adapter, state, Evicted(*(None if part is None else part.roll(1, dims=0) for part in evicted)), *times

    with _hooked(model, lambda encoder: encoder.register_forward_pre_hook(swap)):
        yield


@contextmanager
def frozen_state(model: nn.Module) -> Iterator[None]:
    """Within the block, states stay ``S0``."""

    def keep(encoder: nn.Module, args: tuple[Any, ...], states: Tensor) -> Tensor:
        return args[1][:, None].expand_as(states)

    with _hooked(model, lambda encoder: encoder.register_forward_hook(keep)):
        yield


@contextmanager
def _hooked(model: nn.Module, register: Callable[[PTEEncoder], Any]) -> Iterator[None]:
    hooks = [register(encoder) for encoder in _encoders(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
