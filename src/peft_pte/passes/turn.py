"""What each row does in a call of several tokens, chunk by chunk: who is due, how columns stay aligned, what is kept when a row ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..cache.rows import Clocks
from ..cache.schedule import newest_in
from ..cache.store import Ending
from .plan import Chunk, Counts


@dataclass(frozen=True)
class Turn:
    """The thoughts that each row writes in a call."""

    clocks: Clocks
    """What they have written before."""
    thoughts: tuple[int, ...]
    """Thoughts of each row."""
    offsets: tuple[int, ...]
    """Columns of padding in front of them."""
    columns: int
    """Columns of thoughts."""
    device: torch.device
    sharded: bool = False
    """Whether other processes run the same chunks on the same weights, and each is waited for wherever an encoder runs."""

    @cached_property
    def in_step(self) -> bool:
        """Whether all rows share a clock."""
        return len(set(self.clocks.thoughts)) == 1 and not any(self.offsets)

    @cached_property
    def _before(self) -> Tensor:
        return torch.tensor(self.clocks.thoughts, device=self.device)

    @cached_property
    def _late(self) -> Tensor:
        return torch.tensor(self.offsets, device=self.device)

    @cached_property
    def _new(self) -> Tensor:
        return torch.tensor(self.thoughts, device=self.device)

    def counts(self, prompt: int, new_prompt: int, window: int) -> Counts:
        """What the plan of the call is made by; ``window`` columns of thoughts are there already."""
        rows = zip(self.clocks.thoughts, self.offsets, self.thoughts, strict=True)
        furthest = max((before - late for before, late, new in rows if new), default=max(self.clocks.thoughts))
        due = None
        if self.columns == 1 and not self.in_step:
            due = any(self.clocks.due(row, 0, new) for row, new in enumerate(self.thoughts))
        return Counts(prompt, max(furthest, 0), new_prompt, self.columns, window, max(self.offsets), due)

    def written(self, chunk: Chunk) -> Tensor:
        """``[B]``, thoughts that each row has written when ``chunk`` starts, by its clock."""
        return self._before + (chunk.thought - self._late).clamp(min=0)

    def late(self, chunk: Chunk) -> Tensor:
        """``[B]``, columns of thoughts of ``chunk`` before each row starts."""
        return (self._late - chunk.thought).clamp(min=0)

    def evicts(self, chunk: Chunk) -> bool:
        """Whether any row may be due in ``chunk``, here or in another process: one that starts late may have been before."""
        return chunk.evictions > 1 or (chunk.evictions == 1 and (self.sharded or self.loses_any(chunk)))

    def loses_any(self, chunk: Chunk) -> bool:
        """Whether any row is due at the first eviction of ``chunk``."""
        return any(self._due(chunk.thought))

    def _due(self, thought: int) -> list[bool]:
        rows = enumerate(zip(self.offsets, self.thoughts, strict=True))
        return [self.clocks.due(row, thought - late, new) for row, (late, new) in rows]

    def due(self, chunk: Chunk) -> Tensor | None:
        """``[B, N]``, which rows each eviction of ``chunk`` is for; ``None``: all."""
        starts = [chunk.thought + number * self.clocks.step for number in range(chunk.evictions)]
        if all(all(self._due(start)) for start in starts):
            return None
        thought = torch.tensor(starts, device=self.device) - self._late[:, None]
        here = self._before[:, None] + thought - self.clocks.window
        return (thought >= 0) & (thought < self._new[:, None]) & (here >= 0) & (here % self.clocks.step == 0)

    def loses(self, chunk: Chunk) -> tuple[bool, ...]:
        """Which rows are due at the first eviction of ``chunk``."""
        return tuple(self._due(chunk.thought))

    def numbers(self, chunk: Chunk) -> Tensor:
        """``[B]``, evictions of each row before that of ``chunk``."""
        here = self._before + chunk.thought - self._late - self.clocks.window
        return (here // self.clocks.step).clamp(min=0)

    def first(self, chunk: Chunk) -> int:
        """The fewest of them among rows that are due at the first eviction of ``chunk``."""
        rows = zip(self.clocks.thoughts, self.offsets, self._due(chunk.thought), strict=True)
        least = min((before - late for before, late, due in rows if due), default=self.clocks.window - chunk.thought)
        return (least + chunk.thought - self.clocks.window) // self.clocks.step

    def realigned(self, chunk: Chunk) -> Tensor | None:
        """``[B, columns]``, where the columns of thoughts go after ``chunk`` in which a row starts late; ``None``: they stay."""
        if not any(late > chunk.thought for late in self.offsets) or not chunk.thoughts:
            return None
        held = chunk.held[1] - chunk.drop
        padded = self.late(chunk).clamp(max=chunk.thoughts)[:, None]
        column = torch.arange(held + chunk.thoughts, device=self.device)
        return torch.where(column >= held + padded, column, (column - padded).clamp(min=0))

    def ending(self, chunk: Chunk) -> Ending | None:
        """Rows whose last thought is in ``chunk``, and where the columns of their windows go."""
        first, stop = chunk.thought, chunk.thought + chunk.thoughts
        rows = [
            row
            for row, (late, new) in enumerate(zip(self.offsets, self.thoughts, strict=True))
            if new and first < late + new <= stop
        ]
        if not rows:
            return None
        everyone = len(rows) == len(self.thoughts)
        these = torch.tensor(rows, device=self.device)
        slots = torch.arange(self.clocks.window, device=self.device)
        written, reached = (self._before + self._new)[these], (self._before + stop - self._late)[these]
        width = chunk.held[1] - chunk.drop + chunk.thoughts
        thought = newest_in(slots, written - 1, self.clocks.window)
        columns = (width - reached[:, None] + thought).clamp(min=0, max=width - 1)
        return Ending(None if everyone else these, columns, reached - written, written)
