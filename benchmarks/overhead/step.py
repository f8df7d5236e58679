"""What a step with gradients costs beside LoRA on the same linears, by the length of its passes: launches, time, peak.

Forward and backward of a scoring call, gradient checkpointing on, everything on one CPU: launches are operations that are not views
(on a GPU a kernel each), times are those of the process, peaks those of tensor storages or, at a true shape, counted on fake tensors.
Every figure has a target; the table sets it beside what was found.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.accounting import Launches, PeakMemory
from ..common.fake import COUNTED_LAYERS, PeakCase, counted_step, offloaded_is_elsewhere
from ..common.models import LINEARS, random_llama, shape_config, with_lora, with_pte
from ..common.records import Record
from ..common.session import Session

VOCABULARY = 64
REPEATS = 4


@dataclass(frozen=True)
class Figure:
    """One number of one step; what is measured, on what, and what it must reach."""

    figure: str
    """``launches``, ``calls``, ``seconds``, ``peak`` or ``counted_peak``."""
    thoughts: int
    window: int
    width: int = 64
    layers: int = 4
    batch: int = 1
    prompt: int = 64
    shape: str | None = None
    """A true shape, for ``counted_peak``; it has its own width and layers."""
    per_window: bool = False
    """Whether the ratio is divided by the number of windows."""
    at_most: dict[str, float] = field(default_factory=dict)
    """By peer the most it may be, relative to LoRA (calls: absolute)."""

    @property
    def rank(self) -> int:
        """Rank of the adapters."""
        return 8 if self.width < 256 else 32


FIGURES = (
    Figure("launches", 3072, 1024, at_most={"default": 7.5}),
    Figure("launches", 16384, 1024, layers=2, per_window=True, at_most={"default": 2.6}),
    Figure("calls", 640, 64, at_most={"default": 1}),
    Figure("seconds", 1024, 256, 576, 6, at_most={"default": 1.5, "one_pass": 1.25}),
    Figure("seconds", 240, 32, batch=8, at_most={"default": 3.2}),
    Figure("peak", 3072, 512, 256, 8, batch=4, at_most={"default": 0.4, "one_window": 0.25}),
    Figure("counted_peak", 3072, 1024, 2048, 36, 1, 256, "Qwen2.5-3B", at_most={"default": 0.45, "offload": 0.3}),
    Figure("counted_peak", 16384, 1024, 2048, 36, 1, 256, "Qwen2.5-3B", at_most={"default": 0.2, "offload": 0.08}),
)
QUICK = (
    Figure("launches", 96, 32, layers=2, at_most={"default": 7.5}),
    Figure("calls", 96, 32, layers=2, at_most={"default": 1}),
    Figure("seconds", 96, 32, layers=2, at_most={"default": 3.2}),
    Figure("peak", 96, 32, layers=2, at_most={"default": 0.4}),
    Figure("counted_peak", 768, 256, 256, 4, 1, 64, "tiny", at_most={"default": 0.45}),
)
PASSES: dict[str, float | None] = {
    "default": None,
    "quarter_window": 0.25,
    "half_window": 0.5,
    "one_window": 1.0,
    "two_windows": 2.0,
    "one_pass": float("inf"),
}
"""``segment_length`` in windows; ``None``: it is left out."""
PEERS = ("lora", *PASSES, "offload", "half_window_offload", "two_windows_offload", "one_pass_offload")


def fields_of(peer: str, window: int) -> dict[str, Any] | None:
    """Fields of `PTEConfig` beyond rank and window; ``None``: LoRA."""
    if peer == "lora":
        return None
    passes = peer.removesuffix("offload").rstrip("_") or "default"
    windows, fields = PASSES[passes], {"offload": peer.endswith("offload")}
    if windows is None:
        return fields
    return {**fields, "segment_length": 2**30 if windows == float("inf") else int(windows * window)}


def measure(session: Session) -> Iterator[Record]:
    """One row per figure and peer, LoRA first; a figure of which a peer is missing is taken whole."""
    for figure in QUICK if session.quick else FIGURES:
        if not session.missing("step", figure, PEERS):
            continue
        reference = None
        found = values(figure, [peer for peer in PEERS if peer == "lora" or session.wants(peer)], session.quick)
        for peer, value in found:
            reference = reference or value
            ratio = value / reference / (figure.thoughts / figure.window if figure.per_window else 1)
            target = figure.at_most.get(peer)
            yield {**session.where("step", figure, peer), "value": value, "of_lora": ratio, "at_most": target}


def values(figure: Figure, peers: list[str], quick: bool) -> Iterator[tuple[str, float]]:
    """What ``figure`` is for each of ``peers``."""
    if figure.figure == "seconds":
        yield from seconds(figure, peers, 1 if quick else REPEATS).items()
        return
    function = {"launches": launches, "calls": calls, "peak": peak, "counted_peak": counted}[figure.figure]
    for peer in peers:
        yield peer, function(figure, peer)


def launches(figure: Figure, peer: str) -> int:
    """Operations of a step that are not views."""
    model, batch = build(figure, peer), batch_of(figure)
    with Launches() as found:
        step(model, batch)
    return found.number


def calls(figure: Figure, peer: str) -> int:
    """The most calls of a decoder layer in a scoring call without gradients."""
    model, counts = build(figure, peer).eval(), [0] * figure.layers
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: counts.__setitem__(index, counts[index] + 1))
    with torch.no_grad():
        model(**batch_of(figure))
    return max(counts)


def seconds(figure: Figure, peers: list[str], repeats: int) -> dict[str, float]:
    """Time of the process for a step, the best of several; peers take turns."""
    steps = {peer: partial(step, build(figure, peer), batch_of(figure)) for peer in peers}
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for peer, run in steps.items():
            start = time.process_time()
            run()
            if repeat:  # The first warms up.
                best[peer] = min(best.get(peer, float("inf")), time.process_time() - start)
    return best


def peak(figure: Figure, peer: str) -> int:
    """Bytes of tensor storages alive at once above the model; what is offloaded does not count."""
    model, batch = build(figure, peer), batch_of(figure)
    gc.collect()
    with PeakMemory() as memory, offloaded_is_elsewhere(memory):
        step(model, batch)
    return memory.peak


def counted(figure: Figure, peer: str) -> int:
    """The same at a true shape on fake tensors, without the head; two numbers of layers say what all need."""
    assert figure.shape is not None
    case = PeakCase(figure.shape, figure.thoughts, figure.prompt, figure.window)
    few, more = (counted_step(case, fields_of(peer, figure.window), layers) for layers in COUNTED_LAYERS)
    return few.peak_of(shape_config(figure.shape).num_hidden_layers, more)


def build(figure: Figure, peer: str) -> Any:
    """The adapted model in training, checkpointing on."""
    torch.manual_seed(0)
    width = figure.width
    heads, positions = (max(2, width // 32), max(1, width // 64)), figure.prompt + figure.thoughts
    base = random_llama(VOCABULARY, width, 2 * width, figure.layers, *heads, positions)
    fields, rank = fields_of(peer, figure.window), figure.rank
    if fields is None:
        model = with_lora(base, rank, LINEARS)
    else:
        model = with_pte(base, r=rank, num_global_tokens=rank, cache_window=figure.window, **fields)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def batch_of(figure: Figure) -> dict[str, Any]:
    """Random rows of one length; labels on the thoughts."""
    shape = (figure.batch, figure.prompt + figure.thoughts)
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : figure.prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def step(model: Any, batch: dict[str, Tensor]) -> None:
    """Forward and backward, from no gradients."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
