"""`RaggedLayer`: a bounded layer whose heads hold different numbers of thoughts, as many in all as if each held ``W``.

At rest the thoughts of all heads stand in one line of ``G W`` places: each head has a part of it, from its oldest thought to its newest.
Until a row evicts for the first time the parts are equal; from then on they are the budgets of the heads. Attention takes heads of one
length: they are gathered into it for the layer that runs, and what a head does not hold is masked.

While a call of several tokens runs the heads are columns of one length, and end with the newest; what stands in front of the oldest thought
of a head is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..eviction.budgets import HeadClock
from ..eviction.policy import EvictionPolicy
from ..method.state import Evicted
from .heads import ChoosingLayer
from .schedule import evictions_before
from .store import Departing, Ending, KeyValue, Leaving, SharedSlots, Step, ThoughtLayer, Unrolling, joined, known, put


class RaggedLayer(ChoosingLayer):
    """One full-attention layer whose heads share a window as the policy says.

    Args:
        window: ``W``.
        policy: What leaves, and how much each head holds.
        index: Which layer of the model it is.
        shared: Not used: a layer at fixed addresses has heads of one length.
        step: ``m``.
        longest: Thoughts that a head of any layer holds at most.
    """

    def __init__(
        self,
        window: int,
        policy: EvictionPolicy,
        index: int = 0,
        shared: SharedSlots | None = None,
        *,
        clock: HeadClock,
        longest: int,
    ) -> None:
        super().__init__(window, policy, index, shared)
        self.clock, self.longest = clock, longest
        # [B, G W + 1, head_dim], the last place that of rows that write nothing.
        self.line: KeyValue | None = None
        self.line_positions: Tensor | None = None
        # Where one token per row is written, what attention gets, and which of it a head holds, [B, G, N].
        self._place: Tensor | None = None
        self._index: Tensor | None = None
        self.visible: Tensor | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(  # type: ignore[misc]
            self.window, self.policy, self.index, self.shared, clock=self.clock, longest=self.longest
        )

    def capacity(self, prompt: int) -> int:
        """Slots beside the line: the prompt's."""
        return prompt

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``[e, G]``: what heads lose at their ``e``-th eviction and hold after it; ``[G]``, the first places of their budgets."""
        if device not in self._tables:
            lost, held = (torch.tensor(part, device=device) for part in zip(*self.clock.table, strict=True))
            budgets = torch.tensor(self.clock.budgets, device=device)
            self._tables[device] = (lost, held, budgets.cumsum(0) - budgets)
        return self._tables[device]

    def sizes(self, written: Tensor) -> Tensor:
        """``[B, G]``, thoughts that heads hold after ``written [B]`` and before the next eviction."""
        _, held, _ = self._table(written.device)
        step, evictions = self.clock.step, evictions_before(written - 1, self.window, self.clock.step)
        since = written - self.window - (evictions - 1) * step
        after = held[(evictions - 1).clamp(min=0, max=len(held) - 1)] + since[:, None]
        return torch.where((evictions > 0)[:, None], after, written[:, None])

    def holding(self, written: Tensor) -> Tensor:
        """``[B, G]``, thoughts that heads hold when the next is written behind ``written [B]``, whatever leaves before."""
        return self.sizes(written + 1) - 1

    def _lost(self, numbers: Tensor) -> Tensor:
        lost, _, _ = self._table(numbers.device)
        return lost[numbers.clamp(max=len(lost) - 1)]

    def _most_lost(self, first: int) -> int:
        table = self.clock.table
        return max(max(lost) for lost, _ in table[min(first, len(table) - 1) :])

    def _starts(self, evicted: Tensor, heads: int) -> Tensor:
        """``[B, G]``, the first place of each head, in rows that have ``evicted [B]`` or not."""
        _, _, starts = self._table(evicted.device)
        equal = torch.arange(heads, device=evicted.device) * self.window
        return torch.where(evicted[:, None], starts, equal)

    def held_positions(self, written: Tensor) -> Tensor:
        """``[B, G, N]``, absolute positions of the thoughts of rows that have ``written [B]``; -1 where a head holds fewer."""
        line, positions = known(self.line), known(self.line_positions)
        _, found = self._columns(line, positions, written, self.longest)
        column = torch.arange(self.longest, device=found.device) - self.longest
        return found.masked_fill(column < -self.sizes(written.to(found.device))[..., None], -1)

    # A call of several tokens.

    def unroll(self, how: Unrolling) -> None:
        """Let what stands in the line be columns."""
        self.recent_observed = self.observed
        if self.block is not None:
            self.prompt, self.unrolled = (self.block.narrow(0, how.prompt),) if how.prompt else (), how.prompt
        if self.line is None or not how.columns:
            return
        window, self.column_positions = self._columns(self.line, known(self.line_positions), how.written, how.columns)
        self.recent = (window,)

    def _columns(self, line: KeyValue, positions: Tensor, written: Tensor, columns: int) -> tuple[KeyValue, Tensor]:
        """The thoughts of rows that have ``written [B]``, in ``columns`` that end with the newest."""
        written = written.to(positions.device)
        sizes, heads = self.sizes(written), len(self.clock.budgets)
        starts = self._starts(written > self.window, heads)
        column = torch.arange(columns, device=positions.device) - columns
        index = (starts[..., None] + (sizes[..., None] + column).clamp(min=0)).flatten(1)
        return _heads(line, index, heads), positions.gather(1, index).unflatten(1, (heads, columns))

    def evict(self, step: int, count: int, drop: int, departing: Departing) -> Evicted:
        """What leaves: as many columns as any head loses, of which each has its own."""
        window, positions, choice = joined(self.recent), known(self.column_positions), known(departing.choice)
        device, columns = positions.device, positions.shape[2]
        numbers = choice.numbers.to(device)
        sizes = self.sizes(self.window + numbers * step)
        due = torch.ones_like(numbers, dtype=torch.bool)
        if departing.valid is not None:
            due = departing.valid[:, 0, 0].to(device)
        lost, most = self._lost(numbers), self._most_lost(choice.first)
        column = torch.arange(columns, device=device)
        there = column >= columns - sizes[..., None]
        observed = None if self.recent_observed is None else self.recent_observed.last(self.policy.observed)
        prompt = joined(self.prompt).keys if self.prompt else None
        seen = self._seen(window, positions, observed, prompt, choice.prompt_mask, there)
        chosen = self._chosen(seen, most, choice.recorded, lost)
        order = (there.long() + (there & ~chosen)).argsort(dim=-1, stable=True)
        order = torch.where(due[:, None, None], order, column)
        self.recent, self.column_positions = (window.gather(order),), positions.gather(2, order)
        evicted = self._left(self.recent[0], self.column_positions, columns - sizes + lost, lost, most, due)
        losing = [row for row, loses in enumerate(choice.due) if loses]
        self._note(_where_valid(evicted)[losing], losing)
        self.drop(drop)
        return evicted

    def _left(
        self,
        window: KeyValue,
        positions: Tensor,
        stop: Tensor,
        lost: Tensor,
        most: int,
        due: Tensor,
    ) -> Evicted:
        """The ``lost [B', G]`` columns before ``stop [B', G]`` of rows that are ``due [B']``, ``most`` at most."""
        back = torch.arange(-most, 0, device=positions.device)
        index = (stop[..., None] + back).clamp(min=0, max=positions.shape[2] - 1)
        valid = (back >= -lost[..., None]) & due[:, None, None]
        left = positions.gather(2, index)
        return Evicted(*window.gather(index), left, valid)

    def keep(self, ending: Ending, prompt: int) -> None:
        """Put the columns of rows that have come to the end of a call into the line."""
        window, positions = joined(self.recent), known(self.column_positions)
        device, columns = positions.device, positions.shape[2]
        rows = None if ending.rows is None else ending.rows.to(device)
        if rows is not None:
            window = window.map(lambda part: part.index_select(0, rows))
            positions = positions.index_select(0, rows)
        written, behind = ending.written.to(device), ending.behind.to(device)
        sizes, heads = self.sizes(written), positions.shape[1]
        starts = self._starts(written > self.window, heads)
        count = min(columns, self.longest)
        column = torch.arange(count, device=device)
        # From the oldest thought of each head on; what would come behind its newest goes into the spare place.
        oldest = columns - behind[:, None] - sizes
        source = (oldest[..., None] + column).clamp(min=0, max=columns - 1)
        spare = heads * self.window
        place = torch.where(column < sizes[..., None], starts[..., None] + column, spare).flatten(1)
        taken = window.gather(source)
        batch = joined(self.recent).keys.shape[0]
        if self.block is None:
            # Of a prompt that has no token.
            self.block = taken.map(lambda part: part.new_zeros(batch, part.shape[1], 0, part.shape[3]))
        line = self._line(taken, batch)
        mine = line if rows is None else line.map(lambda part: part.index_select(0, rows))
        held = _known_positions(self.line_positions, batch, spare, device)
        own = held if rows is None else held.index_select(0, rows)
        made = KeyValue(*(_scattered(old, new, place) for old, new in zip(mine, taken, strict=True)))
        own = own.scatter(1, place, positions.gather(2, source).flatten(1))
        self._stand(rows, line, held, made, own)
        self._keep_observed(ending, rows, batch)

    def _stand(
        self, rows: Tensor | None, line: KeyValue, positions: Tensor, made: KeyValue, made_positions: Tensor
    ) -> None:
        """Let ``line`` stand, at ``positions``, but for ``rows [B']`` (``None``: all), which are ``made`` anew."""
        if rows is not None:
            made = KeyValue(*(old.index_copy(0, rows, new) for old, new in zip(line, made, strict=True)))
            made_positions = positions.index_copy(0, rows, made_positions)
        self.line, self.line_positions = made, made_positions

    def _line(self, like: KeyValue, batch: int) -> KeyValue:
        if self.line is not None and self.line.keys.shape[0] == batch:
            return self.line
        places = len(self.clock.budgets) * self.window + 1
        return like.map(lambda part: part.new_zeros(batch, places, part.shape[3]))

    def rest(self, prompt: int) -> None:
        """Keep the columns of the prompt, ``prompt`` by now, and be at rest."""
        held = joined(self.prompt) if self.prompt else None
        if held is not None and held.length > self.unrolled:
            self.block = held
        self.prompt_slots = prompt
        if self.line is None and self.block is not None:
            self.line = self._line(self.block, self.block.keys.shape[0])
            spare = len(self.clock.budgets) * self.window
            self.line_positions = _known_positions(None, self.block.keys.shape[0], spare, self.block.keys.device)
        self.prompt, self.recent, self.unrolled = (), (), 0
        self.column_positions, self.recent_observed = None, None

    def replace(self, rows: Tensor, other: ThoughtLayer, prompt: int, batch: int) -> None:
        """Let ``rows [B']`` of ``batch`` be those of ``other``, behind a prompt of ``prompt``."""
        if not isinstance(other, RaggedLayer):
            raise TypeError("Rows can be replaced by those of a layer with the same budgets alone.")
        new, there = other.at_rest, rows.to(other.at_rest.keys.device)
        held = self.block
        if held is None:
            held = new.map(lambda part: part.new_zeros(batch, part.shape[1], prompt, part.shape[3]))
        held = held.map(lambda part: functional.pad(part, (0, 0, 0, prompt - part.shape[2])))
        self.block = put(held, new, 0, there, False)
        self.prompt_slots = prompt
        line, theirs = self._line(new, batch), known(other.line)
        self.line = KeyValue(*(mine.index_copy(0, there, part) for mine, part in zip(line, theirs, strict=True)))
        positions = _known_positions(self.line_positions, batch, line.keys.shape[1] - 1, there.device)
        self.line_positions = positions.index_copy(0, there, known(other.line_positions))
        self._replace_observed(there, other, batch)

    # One token per row.

    def lose(self, leaving: Leaving, positions: Tensor | None) -> Evicted:
        """A copy of what leaves; what stays moves to where its head begins."""
        line, held = known(self.line), known(self.line_positions)
        device, heads = held.device, len(self.clock.budgets)
        rows = None if leaving.rows is None else leaving.rows.to(device)
        mine = line if rows is None else line.map(lambda part: part.index_select(0, rows))
        own = held if rows is None else held.index_select(0, rows)
        written = leaving.written.to(device)
        numbers = evictions_before(written - 1, self.window, self.clock.step)
        window, at = self._columns(mine, own, written, self.longest)
        sizes = self.sizes(written)
        lost, most = self._lost(numbers), self._most_lost(leaving.first)
        due = torch.ones_like(numbers, dtype=torch.bool) if leaving.over is None else ~leaving.over.to(device)
        column = torch.arange(self.longest, device=device)
        there = column >= self.longest - sizes[..., None]
        seen = self._seen_at_rest(window, at, leaving, rows, there)
        chosen = self._chosen(seen, most, None, lost)
        order = (there.long() + (there & ~chosen)).argsort(dim=-1, stable=True)
        window, at = window.gather(order), at.gather(2, order)
        stop = self.longest - sizes + lost
        evicted = self._left(window, at, stop, lost, most, due)
        self._note(_where_valid(evicted), leaving.places)
        # What stays, from the first place of its head on.
        source = (stop[..., None] + column).clamp(max=self.longest - 1)
        spare = heads * self.window
        stays = (column < (sizes - lost)[..., None]) & due[:, None, None]
        starts = self._starts(torch.ones_like(due), heads)
        place = torch.where(stays, starts[..., None] + column, spare).flatten(1)
        made = KeyValue(*(_scattered(old, new, place) for old, new in zip(mine, window.gather(source), strict=True)))
        own = own.scatter(1, place, at.gather(2, source).flatten(1))
        self._stand(rows, line, held, made, own)
        return evicted

    def ready(self, step: Step, write: Tensor) -> None:
        """Be ready for one more token of each row."""
        positions, heads = known(self.line_positions), len(self.clock.budgets)
        device = positions.device
        self._step, self.write = (step.write, step.positions.clone()), write.to(device)
        self.watched = step.until <= self.policy.observed
        thoughts = step.thoughts.to(device)
        # An eviction before this thought has been.
        evicted = thoughts >= self.window
        sizes = self.holding(thoughts)
        starts = self._starts(evicted, heads)
        writes = (step.write != self.window).to(device)
        spare = heads * self.window
        self._place = torch.where(writes[:, None], starts + sizes, spare)
        # From the first eviction on as wide as ever.
        width = step.most if step.most <= self.window else self.longest
        column = torch.arange(width, device=device)
        self._index = (starts[..., None] + column).clamp(max=spare).flatten(1)
        self.visible = column <= sizes[..., None]
        new = step.positions.to(device)[:, None].expand(-1, heads)
        self.line_positions = positions.scatter(1, self._place, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see."""
        if key_states.shape[1] != len(self.clock.budgets):
            raise ValueError(
                f"`importance` must hold {key_states.shape[1]} numbers for layer {self.index}, one for each KV head, got "
                f"{len(self.clock.budgets)}. Measure it on this model: peft_pte.head_importance(model, input_ids)."
            )
        if self.write is None:
            return self._append(KeyValue(key_states, value_states))
        new, place, heads = KeyValue(key_states, value_states), known(self._place), len(self.clock.budgets)
        line = known(self.line)
        made = KeyValue(*(_scattered(old, part, place) for old, part in zip(line, new, strict=True)))
        self.line = made
        window = _heads(made, known(self._index), heads)
        if self.block is None or not self.prompt_slots:
            return window.keys, window.values
        keys, values = joined((self.block.narrow(0, self.prompt_slots), window))
        return keys, values

    # What all caches can do.

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held, for counting bytes."""
        positions = () if self.line_positions is None else (self.line_positions,)
        return (*super().tensors(), *(self.line or ()), *positions)

    def map(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to everything held."""
        super().map(function)
        self.line = None if self.line is None else self.line.map(function)
        self.line_positions = None if self.line_positions is None else function(self.line_positions)


def _where_valid(evicted: Evicted) -> Tensor:
    """``[B, G, E]``, positions of what left; -1 where a head lost less."""
    return evicted.positions if evicted.valid is None else evicted.positions.masked_fill(~evicted.valid, -1)


def _heads(line: KeyValue, index: Tensor, heads: int) -> KeyValue:
    """``[B, G, N, head_dim]``, the places ``index [B, G N]`` of a line."""
    return line.map(
        lambda part: part.gather(1, index[..., None].expand(-1, -1, part.shape[2])).unflatten(1, (heads, -1))
    )


def _scattered(line: Tensor, new: Tensor, place: Tensor) -> Tensor:
    """``line`` with ``new [B, G, N, head_dim]`` in the places ``[B, G N]``."""
    return line.scatter(1, place[..., None].expand(-1, -1, line.shape[2]), new.flatten(1, 2))


def _known_positions(positions: Tensor | None, batch: int, spare: int, device: torch.device) -> Tensor:
    if positions is not None and positions.shape[0] == batch:
        return positions
    return torch.zeros(batch, spare + 1, dtype=torch.long, device=device)
