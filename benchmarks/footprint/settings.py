"""What the settings of a training step cost and save at true shapes, beside LoRA: launches, operations, bytes kept, peak.

Forward and backward of one sequence on fake tensors, as in `common/fake.py`. Two numbers of layers say
what all need, and of PTE two lengths what longer completions need, since some windows in it grows in a straight line. LoRA is counted
at every length: its attention does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from ..common.fake import COUNTED_LAYERS, Costs, Counted, PeakCase, count
from ..common.models import shape_config
from ..common.records import Record
from ..common.session import Session

SETTINGS = ("least", "default", "one_pass")
PEERS = ("lora", *SETTINGS, *(f"{name}_offload" for name in SETTINGS))
SHAPES = ("Qwen2.5-3B", "Qwen3-4B", "Qwen2.5-7B", "Llama-3.1-8B")
LENGTHS = (3072, 16384, 65536)
CHECKED = ("default", "one_pass_offload")
"""What is counted with a further layer and at a further length, too."""


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


def measure(session: Session) -> Iterator[Record]:
    """One row per shape, setting and length."""
    if session.quick:
        yield from rows_of(PeakCase("tiny", 0, prompt=32, window=32, rank=4), session, (96, 192))
        return
    for shape in session.shapes or SHAPES:
        yield from rows_of(PeakCase(shape, 0), session, LENGTHS)


def rows_of(case: PeakCase, session: Session, lengths: tuple[int, ...]) -> Iterator[Record]:
    """Rows of one shape; of a setting all lengths, if one is missing."""
    layers: int = shape_config(case.shape).num_hidden_layers
    cases = [replace(case, completion=length) for length in lengths]
    for peer in filter(session.wants, PEERS):
        if all(session.has("settings", one, peer) for one in cases):
            continue
        fields, counted = fields_of(peer, case.window), counted_lengths(peer, lengths)
        found = {length: Counted.of(replace(case, completion=length), fields) for length in counted}
        check = {}
        if peer in CHECKED:
            longer, more = 2 * counted[-1] - counted[-2], COUNTED_LAYERS[1] + 1
            seen = asdict(count(replace(case, completion=longer), fields, more)[0])
            said = asdict(along(found, longer, more))
            check = {"checked": {name: seen[name] / said[name] for name in said}}
        for one in cases:
            yield {**session.where("settings", one, peer), **asdict(along(found, one.completion, layers)), **check}


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
