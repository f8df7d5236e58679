"""What the settings of a training step cost and save at true shapes, beside LoRA: launches, operations, bytes kept, peak.

Forward and backward of one sequence on fake tensors, as in `peaks`, with every operation counted by `Work`. Two numbers of layers say
what all need, and of PTE two lengths what longer completions need, since some windows in it grows in a straight line. LoRA is counted
at every length: its attention does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .accounting import Launches
from .cases import shape_config
from .peaks import COUNTED_LAYERS, PeakCase, Step, counted_step
from .session import Row, Session

SETTINGS = ("least", "default", "one_pass")
PEERS = ("lora", *SETTINGS, *(f"{name}_offload" for name in SETTINGS))
SHAPES = ("Qwen2.5-3B", "Qwen3-4B", "Qwen2.5-7B", "Llama-3.1-8B")
LENGTHS = (3072, 16384, 65536)
CHECKED = ("default", "one_pass_offload")
"""What is counted with a further layer and at a further length, too."""


@dataclass(frozen=True)
class Costs:
    """One step of one sequence."""

    launches: float
    """Operations that are not views."""
    flop: float
    """Of matmuls and attention; under a mask attention is all pairs of its chunk, without one those that are causal."""
    kept_bytes: float
    """Alive between forward and backward, beside what the backbone returned."""
    peak_bytes: float
    """Alive at once above the weights."""

    def toward(self, other: Costs, share: float) -> Costs:
        """On the straight line through both, ``share`` of the way; 1 is ``other``."""
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return Costs(**{name: mine + share * (theirs - mine) for (name, mine), theirs in pairs})


@dataclass(frozen=True)
class Counted:
    """One case with few layers and with more."""

    few: Costs
    more: Costs
    steps: tuple[Step, Step]

    @classmethod
    def of(cls, case: PeakCase, peer: str) -> Counted:
        """Count both."""
        pairs = [count(case, peer, layers) for layers in COUNTED_LAYERS]
        return cls(*(costs for costs, _ in pairs), steps=tuple(step for _, step in pairs))

    def at(self, layers: int) -> Costs:
        """What ``layers`` layers cost."""
        few, more = self.steps
        line = self.few.toward(self.more, (layers - few.layers) / (more.layers - few.layers))
        return replace(line, peak_bytes=few.peak_of(layers, more))


def count(case: PeakCase, peer: str, layers: int) -> tuple[Costs, Step]:
    """One step of ``layers`` layers."""
    work = Work()
    step = counted_step(case, fields_of(peer, case.window), layers, work)
    return Costs(work.number, work.flop, step.kept, step.peak), step


class Work(Launches):
    """Launches and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            place, products = _ATTENTION[packet]
            self.flop += products * _of_attention(
                *args[place : place + 2], masked=(kwargs or {}).get("attn_mask") is not None
            )
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}
"""Where the queries stand among the arguments, and how many products are taken."""


def _of_attention(query: torch.Tensor, key: torch.Tensor, masked: bool) -> int:
    """Operations of one product of attention."""
    batch, heads, queries, head_dim = query.shape
    pairs = queries * key.shape[2] if masked else queries * (queries + 1) // 2
    return 2 * batch * heads * pairs * head_dim


def fields_of(peer: str, window: int) -> dict[str, Any] | None:
    """Fields of `PTEConfig` beyond rank and window; ``None``: LoRA."""
    if peer == "lora":
        return None
    passes: dict[str, dict[str, Any]] = {
        "least": {"segment_length": window // 2, "chunk_length": window // 4},
        "default": {},
        "one_pass": {"segment_length": 2**30},
    }
    return {**passes[peer.removesuffix("_offload")], "offload": peer.endswith("_offload")}


def measure(session: Session) -> Iterator[Row]:
    """One row per shape, setting and length."""
    if session.quick:
        yield from rows_of(PeakCase("tiny", 0, prompt=32, window=32, rank=4), session, (96, 192))
        return
    for shape in [shape for shape in session.shapes if shape in SHAPES] or SHAPES:
        yield from rows_of(PeakCase(shape, 0), session, LENGTHS)


def rows_of(case: PeakCase, session: Session, lengths: tuple[int, ...]) -> Iterator[Row]:
    """Rows of one shape."""
    layers: int = shape_config(case.shape).num_hidden_layers
    for peer in filter(session.wants, PEERS):
        counted = counted_lengths(peer, lengths)
        found = {length: Counted.of(replace(case, completion=length), peer) for length in counted}
        check = {}
        if peer in CHECKED:
            longer, more = 2 * counted[-1] - counted[-2], COUNTED_LAYERS[1] + 1
            seen = asdict(count(replace(case, completion=longer), peer, more)[0])
            said = asdict(along(found, longer, more))
            check = {"checked": {name: seen[name] / said[name] for name in said}}
        for length in lengths:
            cost = asdict(along(found, length, layers))
            yield {**asdict(replace(case, completion=length)), "peer": peer, **cost, **check}


def along(found: dict[int, Counted], length: int, layers: int) -> Costs:
    """The costs at ``length``: those found there, or on the straight line through the two longest."""
    if length in found:
        return found[length].at(layers)
    short, long = sorted(found)[-2:]
    return found[short].at(layers).toward(found[long].at(layers), (length - short) / (long - short))


def counted_lengths(peer: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """What is counted to know ``lengths``.

    One pass holds as much as it is long, and where its peak lies depends on it, so its slope is taken between long ones.
    """
    shortest, middle = lengths[0], lengths[1]
    if peer == "lora":
        return lengths
    return (shortest, middle * 3 // 4, middle) if peer.startswith("one_pass") else (shortest, shortest * 5 // 3)
