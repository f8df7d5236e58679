"""`Rows`: the clocks of the rows of a cache. Each row has its own: what it has written, what it sees, when it evicts.

Counts are kept twice. On the device, where a row that has ended stands still and nothing waits to hear of it; and on the host, as if no
row had, so that what happens at a step is planned without a look at a tensor. The two are brought together between generations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .schedule import evictions_before, first_visible, held_after, is_due, newest_in, until_due
from .store import Leaving, Step, Unrolling


@dataclass(frozen=True)
class Clocks:
    """What rows have written when a call starts."""

    thoughts: tuple[int, ...]
    window: int
    step: int

    def offsets(self, new: tuple[int, ...]) -> tuple[int, ...]:
        """Columns of padding in front of ``new`` thoughts per row that let evictions come in the same columns."""
        phases = [(count - self.window) % self.step for count in self.thoughts]
        writing = {phase for phase, count in zip(phases, new, strict=True) if count}
        if len(writing) < 2 or max(new) < 2:
            return (0,) * len(new)
        first = min(writing)
        return tuple(phase - first if count else 0 for phase, count in zip(phases, new, strict=True))

    def due(self, row: int, thought: int, new: int) -> bool:
        """Whether an eviction comes before the thought ``thought`` of the ``new`` ones of a row."""
        return 0 <= thought < new and is_due(self.thoughts[row] + thought, self.window, self.step)


class Rows:
    """What each row of a cache holds.

    Args:
        batch: ``B``.
        window: ``W``.
        step: ``m``, tokens of an eviction.
        device: Where counts are kept.
        observed: Of how many thoughts before an eviction queries are looked at.

    Attributes:
        columns: Columns that the caller has given, padding and all.
        prompt: Slots of the prompts, ``P``.
        prompt_mask: ``[B, P]``, False where a row's prompt does not use a slot; ``None``: all do.
        thoughts: ``[B]``, thoughts that each row has written.
        bound: The same on the host, counting rows that have ended as if they went on.
        running: ``[B]``, False for rows that have ended in this generation; ``None``: none has.
        unused: ``[B]``, columns that a row was given behind its own end; the caller may not know that they are padding.
        ended: ``[B]``, True for rows that ended in the generation before the next call; ``None``: none did.
        padding_token: What that generation appended to them.
        positions: ``[B, W + 1]``, absolute position of the thought in each slot, where all heads hold the same ones.
        replaced: Whether rows were replaced, so that some start at other columns than their prompt says.
        paused: Rows that steps leave as they are: which go on, ``[B]``, and the same on the host; ``None``: all do.
    """

    def __init__(self, batch: int, window: int, step: int, device: torch.device, observed: int = 0) -> None:
        self.window, self.step, self.observed = window, step, observed
        self.columns = self.prompt = 0
        self.prompt_mask: Tensor | None = None
        self.thoughts = torch.zeros(batch, dtype=torch.long, device=device)
        self.bound = [0] * batch
        self.running: Tensor | None = None
        self.unused: Tensor | None = None
        self.ended: Tensor | None = None
        self.padding_token: int | None = None
        self.positions = torch.zeros(batch, window + 1, dtype=torch.long, device=device)
        self.replaced = False
        self.paused: tuple[Tensor, list[bool]] | None = None
        self._prompts: list[int] | None = None
        self._slots = torch.arange(window, device=device)
        self._lists: dict[tuple[int, ...], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where counts are kept."""
        return self.thoughts.device

    @property
    def clocks(self) -> Clocks:
        """What they have written, as far as the host knows."""
        return Clocks(tuple(self.bound), self.window, self.step)

    @property
    def in_step(self) -> bool:
        """Whether all rows have written as many thoughts, as far as the host knows."""
        return min(self.bound) == max(self.bound)

    @property
    def evictions(self) -> int:
        """Evictions of the row that had most, as far as the host knows."""
        most = max(self.bound)
        return evictions_before(most - 1, self.window, self.step) if most else 0

    @property
    def lengths(self) -> Tensor:
        """``[B]``, tokens of each row, padding apart."""
        prompt = self.prompt if self.prompt_mask is None else self.prompt_mask.sum(dim=1)
        return self.thoughts + prompt

    @property
    def longest(self) -> int:
        """Tokens of the longest row, as far as the host knows; padding of its prompt counts, until rows are replaced."""
        if self.prompt_mask is None or not self.replaced:
            return self.prompt + max(self.bound)
        if self._prompts is None:
            self._prompts = self.prompt_mask.sum(dim=1).tolist()
        return max(prompt + thoughts for prompt, thoughts in zip(self._prompts, self.bound, strict=True))

    @property
    def past(self) -> Tensor | None:
        """``[B, .]``, False where a column that was seen holds no token of a row; those behind the last hold tokens. ``None``: all do."""
        if not self.replaced:
            return self.prompt_mask
        return torch.arange(self.columns, device=self.device) >= (self.columns - self.lengths)[:, None]

    @property
    def empty(self) -> Tensor:
        """``[B]``, columns of the caller that hold no token of a row."""
        return self.columns - self.lengths

    @property
    def padded(self) -> bool:
        """Whether a column that the caller gave may hold no token, as far as the host knows."""
        return self.prompt_mask is not None or any(self.prompt + count != self.columns for count in self.bound)

    # Calls of several tokens.

    def synchronize(self) -> None:
        """Let the host know which rows have ended; what it is told of counts is exact from here to the next step."""
        if self.running is None:
            return
        behind = torch.tensor(self.bound, device=self.device) - self.thoughts
        self.note_unused(behind)
        self.ended = ~self.running
        self.bound, self.running, self._lists = self.thoughts.tolist(), None, {}

    def can_take_back(self, thoughts: Sequence[int]) -> bool:
        """Whether the last ``thoughts`` of each row are there and evicted nothing."""
        for count, back in zip(self.bound, thoughts, strict=True):
            before, now = (evictions_before(number - 1, self.window, self.step) for number in (count, count - back))
            if back > count or (back and before != now):
                return False
        return True

    def take_back(self, thoughts: Sequence[int]) -> None:
        """Forget the last ``thoughts`` of each row, which evicted nothing."""
        after = [count - back for count, back in zip(self.bound, thoughts, strict=True)]
        self.bound, self._lists = after, {}
        self.thoughts = torch.tensor(after, device=self.device)

    def begin(self, columns: int, mask: Tensor | None) -> None:
        """Take ``columns`` slots of prompt more; ``mask [B, columns]`` is False where a row does not use one, ``None``: all do."""
        if mask is not None or self.prompt_mask is not None:
            batch = self.thoughts.shape[0]
            parts = ((self.prompt_mask, self.prompt), (mask, columns))
            ones = (
                torch.ones(batch, width, dtype=torch.bool, device=self.device) if part is None else part
                for part, width in parts
            )
            self.prompt_mask = torch.cat(list(ones), dim=1)
        self.prompt += columns
        self._prompts = None

    def write(self, thoughts: Sequence[int]) -> None:
        """Note that so many thoughts were written."""
        self.bound = [before + new for before, new in zip(self.bound, thoughts, strict=True)]
        self.thoughts = self.thoughts + torch.tensor(thoughts, device=self.device)

    def note_unused(self, columns: Tensor) -> None:
        """Note that so many columns ``[B]`` were given to each row behind its end."""
        self.unused = columns if self.unused is None else self.unused + columns

    def replace(self, rows: Sequence[int], other: Rows) -> None:
        """Let ``rows`` be those of ``other``; to the caller they are padded in front to the columns that others have."""
        more = max(0, other.prompt - self.prompt)
        nowhere = torch.zeros(len(self.bound), more, dtype=torch.bool, device=self.device)
        self.begin(more, nowhere if more else None)
        there = torch.tensor(rows, device=self.device)
        theirs = other.prompt_mask
        if theirs is None:
            theirs = torch.ones(len(rows), other.prompt, dtype=torch.bool, device=self.device)
        theirs = functional.pad(theirs, (0, self.prompt - other.prompt))
        if self.prompt_mask is None and not bool(theirs.all()):
            self.prompt_mask = torch.ones(len(self.bound), self.prompt, dtype=torch.bool, device=self.device)
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask.index_copy(0, there, theirs)
        for row, count in zip(rows, other.bound, strict=True):
            self.bound[row] = count
        self._lists, self._prompts, self.paused = {}, None, None
        self.thoughts = self.thoughts.index_copy(0, there, other.thoughts)
        self.positions = self.positions.index_copy(0, there, other.positions)
        if self.unused is not None:
            self.unused = self.unused.index_fill(0, there, 0)
        if self.ended is not None:
            self.ended = self.ended.index_fill(0, there, False)
        self.columns = max(self.columns, other.columns)
        self.replaced = True

    def unrolling(self, spare: int = 0) -> Unrolling:
        """How what stands in slots becomes columns: each row from its oldest thought to its newest, which is the last.

        ``spare`` more than ``W`` of them where heads hold more.
        """
        columns = max(min(count, held_after(count, self.window, self.step) + spare) for count in self.bound)
        if self.in_step and self.bound[0] <= self.window:
            return Unrolling(self.prompt, columns, None, self.thoughts)
        thought = self.thoughts[:, None] - columns + torch.arange(columns, device=self.device)
        return Unrolling(self.prompt, columns, thought.clamp(min=0) % self.window, self.thoughts)

    def slots_of(self, written: Tensor) -> Tensor:
        """``[B', W]``, the newest thought in each slot of rows that have written ``written [B']``; negative: none."""
        return newest_in(self._slots, written - 1, self.window)

    # One token per row.

    def next_step(self, positions: Tensor, real: Tensor | None, writes: Sequence[bool] | None) -> Step:
        """Count one more thought of each row.

        Args:
            positions: ``[B]``, absolute.
            real: ``[B]``, False for rows that get padding; ``None``: for none. Rows that have ended get none anyway.
            writes: The same on the host.
        """
        counts, running = self.thoughts, self.running
        if real is not None:
            running = real if running is None else running & real
        first, in_step = self.bound[0], self.in_step
        if in_step and not is_due(first, self.window, self.step):
            evicting = []
        else:
            evicting = [
                row
                for row, count in enumerate(self.bound)
                if is_due(count, self.window, self.step) and (writes is None or writes[row])
            ]
        leaving = self._leaving(evicting, running) if evicting else None
        until = min(until_due(count, self.window, self.step) for count in set(self.bound)) if self.observed else 0
        if in_step:
            write = torch.full_like(counts, first % self.window)
        else:
            write = counts % self.window
        if running is not None:
            write = torch.where(running, write, self.window)
        if in_step and writes is None:
            self.bound = [first + 1] * len(self.bound)
        else:
            self.bound = [count + (writes is None or writes[row]) for row, count in enumerate(self.bound)]
        self.thoughts = counts + 1 if running is None else counts + running
        slots = self.prompt + min(max(self.bound), self.window)
        return Step(leaving, write, write + self.prompt, positions, counts, until, max(self.bound), slots)

    def _leaving(self, evicting: list[int], running: Tensor | None) -> Leaving:
        rows = None if len(evicting) == len(self.bound) else self._rows(evicting)
        counts = self.thoughts if rows is None else self.thoughts.index_select(0, rows)
        over = None
        if running is not None:
            over = ~(running if rows is None else running.index_select(0, rows))
        mask = self.prompt_mask if self.observed else None
        if mask is not None and rows is not None:
            mask = mask.index_select(0, rows)
        first = min(self.bound[row] for row in evicting)
        return Leaving(
            rows,
            (counts[:, None] + self._slots[: self.step]) % self.window,
            over,
            counts,
            mask,
            (first - self.window) // self.step,
            tuple(evicting),
        )

    def positions_of(self, leaving: Leaving) -> Tensor:
        """``[B', 1, m]``, absolute positions of what leaves."""
        held = self.positions if leaving.rows is None else self.positions.index_select(0, leaving.rows)
        return held.gather(1, leaving.slots)[:, None]

    def note_positions(self, step: Step) -> None:
        """Note the positions of what is written."""
        self.positions = self.positions.scatter(1, step.write[:, None], step.positions[:, None])

    def visible(self) -> Tensor:
        """``[B, W]``, which slots of the window the newest thought of each row sees."""
        newest = self.thoughts - 1
        return newest_in(self._slots, newest, self.window) >= first_visible(newest, self.window, self.step)[:, None]

    def visible_slots(self, slots: int) -> Tensor:
        """``[B, slots]``, or ``[1, slots]`` where all rows see the same: the same behind the slots of the prompt.

        What a row that has ended sees is nobody's concern, so the host's counts will do.
        """
        if self.in_step:
            rows = 1 if self.prompt_mask is None else len(self.bound)
            seen = torch.ones(rows, slots, dtype=torch.bool, device=self.device)
            if self.prompt_mask is not None:
                seen[:, : self.prompt] = self.prompt_mask
            for start, stop in self._unused_slots(self.bound[0], slots - self.prompt):
                seen[:, self.prompt + start : self.prompt + stop] = False
            return seen
        prompt = self.prompt_mask
        if prompt is None:
            prompt = torch.ones(len(self.bound), self.prompt, dtype=torch.bool, device=self.device)
        seen = torch.cat([prompt, self.visible()], dim=1)
        return seen[:, :slots] if slots <= seen.shape[1] else functional.pad(seen, (0, slots - seen.shape[1]))

    def _unused_slots(self, written: int, slots: int) -> list[tuple[int, int]]:
        """Which of ``slots`` slots behind the prompt hold nothing after ``written`` thoughts: from, and up to."""
        held = held_after(written, self.window, self.step)
        start, free = written % self.window, self.window - held
        if written <= held:
            return [(written, slots)] if written < slots else []
        around = max(0, start + free - self.window)
        parts = [(start, min(start + free, self.window)), (0, around), (self.window, slots)]
        return [(first, last) for first, last in parts if first < last]

    @property
    def all_visible(self) -> bool:
        """Whether the host knows that every row sees all slots in use, of its prompt and of its window."""
        if self.prompt_mask is not None or not self.in_step:
            return False
        return held_after(self.bound[0], self.window, self.step) == min(self.bound[0], self.window)

    def pause(self, goes_on: Sequence[bool]) -> None:
        """Let steps leave the rows that do not go on as they are, until a row is replaced, or rows move."""
        paused = list(goes_on)
        self.paused = None if all(paused) else (torch.tensor(paused, device=self.device), paused)

    def note_ends(self, going_on: Tensor, padding_token: int | None) -> None:
        """Let rows not ``going_on [B]`` have ended: what they are given from here on is padding, ``padding_token``."""
        self.padding_token = padding_token
        self.running = going_on if self.running is None else self.running & going_on

    def _rows(self, rows: list[int]) -> Tensor:
        known = self._lists.get(tuple(rows))
        if known is None:
            # From pinned memory, or the host would wait until the device has caught up.
            made = torch.tensor(rows, dtype=torch.long, pin_memory=self.device.type == "cuda")
            known = self._lists[tuple(rows)] = made.to(self.device, non_blocking=True)
        return known

    # Rows that move.

    def fork(self) -> Rows:
        """Independent counts that say the same."""
        other = copy.copy(self)
        other.bound, other._lists = list(self.bound), {}
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device."""
        thoughts = function(self.thoughts)
        if self.in_step:
            self.bound = self.bound[:1] * thoughts.shape[0]
        elif thoughts.device == self.device:
            self.bound = function(torch.tensor(self.bound, device=self.device)).tolist()
        self.thoughts, self.positions = thoughts, function(self.positions)
        for name in ("prompt_mask", "running", "unused", "ended"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else function(part))
        self._slots, self._lists = self._slots.to(thoughts.device), {}
        self._prompts, self.paused = None, None

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held, for counting bytes."""
        parts = (self.thoughts, self.positions, self.prompt_mask, self.running, self.unused, self.ended)
        return tuple(part for part in parts if part is not None)
