"""What happens when in one pass: counts of columns in, a table of chunks out. Pure: no model, no tensor.

A layer takes the columns of a pass chunk by chunk: *evict, encode, attend, write*. Chunks are aligned on the clock
(:mod:`peft_pte.cache.schedule`): the evictions of a chunk come ``m`` thoughts apart, from its first thought on, so that its thoughts read
``N`` states, ``m`` of them each. What a chunk evicts is in the window when it starts.

Rows that do not share a clock are padded in front until their evictions come in the same columns; the plan is that of the row that is
furthest, and which of the others are due is said elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..cache.schedule import evictions_before

SLACK = 1.5
"""How much longer than the others a chunk before the first eviction may be: a short prompt needs no chunk of its own."""


class Chunk(NamedTuple):
    """Columns that a layer takes at once."""

    start: int
    """First column of the call."""
    prompt: int
    """Columns of prompt, which come first."""
    thoughts: int
    """Columns of thoughts."""
    evictions: int
    """Evictions ``N``: one before the first thought, the others ``m`` thoughts apart."""
    before: int
    """Evictions before those."""
    held: tuple[int, int]
    """Columns that the layer has when the chunk starts: of the prompt, and of thoughts before anything leaves."""
    drop: int
    """Columns of thoughts that are gone before anything is attended to: ``m`` of those that leave, where all rows have started."""
    kept: int
    """Columns of thoughts that stay when it ends."""
    thought: int
    """Columns of thoughts of the call before it."""

    @property
    def length(self) -> int:
        """Columns."""
        return self.prompt + self.thoughts

    @property
    def stop(self) -> int:
        """Column behind the last."""
        return self.start + self.length


@dataclass(frozen=True)
class Counts:
    """What was written before a call, and what the call brings; columns."""

    prompt: int
    thoughts: int
    """By the clock of the row that is furthest."""
    new_prompt: int
    new_thoughts: int
    window: int
    """Columns of thoughts that layers have."""
    late: int = 0
    """Columns of thoughts before the last row starts."""
    due: bool | None = None
    """Whether an eviction comes before the only thought of a call whose rows share no clock; ``None``: they do, or are made to."""


@dataclass(frozen=True)
class Sizes:
    """What chunks are made by; tokens."""

    window: int
    """``W``."""
    step: int
    """``m``, tokens of an eviction."""
    chunk: int
    """Thoughts (or columns of prompt) of a chunk, at most."""
    evictions: int
    """Evictions of a chunk, at most: one where what leaves next depends on what the chunk itself makes."""
    spare: int = 0
    """Thoughts beyond ``W`` that heads hold which share a window with others."""
    whole_prompt: bool = False
    """Whether the prompt of the call is one chunk: some of its tokens see later ones."""


@dataclass(frozen=True)
class Plan:
    """The chunks of a call, in order; ``print`` shows them."""

    chunks: tuple[Chunk, ...]
    step: int

    def passes(self, longest: int | None) -> Iterator[Plan]:
        """Cut into passes of at most ``longest`` columns (``None``: one pass), at the edges of chunks."""
        rest = list(self.chunks)
        while rest:
            taken = [rest.pop(0)]
            while rest and (longest is None or rest[0].stop - taken[0].start <= longest):
                taken.append(rest.pop(0))
            yield Plan(tuple(taken), self.step)

    @property
    def start(self) -> int:
        """First column."""
        return self.chunks[0].start

    @property
    def stop(self) -> int:
        """Column behind the last."""
        return self.chunks[-1].stop

    @property
    def evictions(self) -> int:
        """Evictions of all chunks."""
        return sum(chunk.evictions for chunk in self.chunks)

    def __str__(self) -> str:
        head = f"{'columns':>15} {'prompt':>7} {'thoughts':>8} {'evictions':>9} {'states':>9} {'slots seen':>10}"
        return "\n".join([head, *map(self._line, self.chunks)])

    def _line(self, chunk: Chunk) -> str:
        columns = f"{chunk.start}..{chunk.stop - 1}"
        first = chunk.before + min(chunk.evictions, 1)
        states = f"S{first}" if chunk.evictions < 2 else f"S{first}..S{chunk.before + chunk.evictions}"
        seen = sum(chunk.held) - chunk.drop + chunk.length
        return f"{columns:>15} {chunk.prompt:>7} {chunk.thoughts:>8} {chunk.evictions:>9} {states:>9} {seen:>10}"


def make_plan(counts: Counts, sizes: Sizes) -> Plan:
    """The chunks of a call."""
    return Plan(tuple(_chunks(counts, sizes)), sizes.step)


def _chunks(counts: Counts, sizes: Sizes) -> Iterator[Chunk]:
    window, step = sizes.window, sizes.step
    prompt, thought, column = counts.prompt, counts.thoughts, 0
    last = counts.thoughts + (counts.new_thoughts if counts.due is None else 0)
    before = evictions_before(thought - 1, window, step) if thought else 0
    held = counts.window

    def chunk(new_prompt: int, new_thoughts: int, evictions: int) -> Chunk:
        done = thought - counts.thoughts
        drop = step if evictions and done >= counts.late else 0
        if sizes.spare:
            drop = min(drop, max(0, held + step - window - sizes.spare))
        kept = held + new_thoughts
        if new_thoughts and done + new_thoughts >= counts.late:
            kept = min(kept, thought + new_thoughts - (before + evictions) * step + sizes.spare)
        return Chunk(column, new_prompt, new_thoughts, evictions, before, (prompt, held), drop, kept, done)

    if sizes.whole_prompt and counts.new_prompt:
        yield (made := chunk(counts.new_prompt, 0, 0))
        prompt, column, held = prompt + counts.new_prompt, counts.new_prompt, made.kept
    # Before the first eviction every column sees all before it: the prompt and the first window are cut alike.
    left = counts.prompt + counts.new_prompt - prompt
    free = left + min(max(window - thought, 0), last - counts.thoughts)
    pieces = max(1, -(-free // sizes.chunk) if free > SLACK * sizes.chunk else 1)
    for piece in range(pieces):
        length = free * (piece + 1) // pieces - free * piece // pieces
        if length:
            of_prompt = min(length, counts.prompt + counts.new_prompt - prompt)
            yield (made := chunk(of_prompt, length - of_prompt, 0))
            prompt, thought, column, held = prompt + of_prompt, thought + length - of_prompt, column + length, made.kept
    while thought < last:
        into = (thought - window) % step
        if into or sizes.chunk < step:
            # In the middle of a block nothing is due; a block longer than a chunk comes in pieces.
            length, evictions = min(step - into, sizes.chunk, last - thought), int(into == 0)
        else:
            most = 1 if thought - counts.thoughts < counts.late else sizes.evictions
            evictions = max(1, min(most, sizes.chunk // step, window // step, (last - thought) // step))
            length = min(evictions * step, last - thought)
        yield (made := chunk(0, length, evictions))
        thought, column, before, held = thought + length, column + length, before + evictions, made.kept
    if counts.due is not None and counts.new_thoughts:
        evictions = int(counts.due)
        yield Chunk(column, 0, counts.new_thoughts, evictions, before, (prompt, held), 0, held + counts.new_thoughts, 0)
