"""`ChoosingLayer`: a bounded layer each head of which chooses for itself what leaves; it knows positions by head, and recent queries.

What a policy gives up is moved to where the oldest thoughts would be, in columns and in slots alike: when thoughts leave, and where the next
ones go, is as without a choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..eviction.policy import EvictionPolicy, Window
from ..method.state import Evicted
from .store import (
    Departing,
    Ending,
    KeyValue,
    Leaving,
    Recorded,
    SharedSlots,
    Step,
    ThoughtLayer,
    Unrolling,
    at_address,
    joined,
    known,
    put,
    rows_of,
)


class Observed(NamedTuple):
    """Queries of the last thoughts, oldest first."""

    queries: Tensor
    """``[B, H, n, head_dim]``."""
    positions: Tensor
    """``[B, n]``, absolute."""

    @property
    def length(self) -> int:
        """Thoughts ``n``."""
        return self.positions.shape[1]

    def map(self, function: Callable[[Any], Any]) -> Observed:
        """Apply ``function`` to both."""
        return Observed(function(self.queries), function(self.positions))

    def gather(self, index: Tensor) -> Observed:
        """Those at ``index [B, n']``."""
        wide = index[:, None, :, None].expand(-1, self.queries.shape[1], -1, self.queries.shape[3])
        return Observed(self.queries.gather(2, wide), self.positions.gather(1, index))

    def last(self, count: int) -> Observed:
        """The last ``count``."""
        start = max(0, self.length - count)
        return Observed(self.queries[:, :, start:], self.positions[:, start:])

    def followed_by(self, other: Observed) -> Observed:
        """These, then those of ``other``."""
        return Observed(
            torch.cat([self.queries, other.queries], dim=2), torch.cat([self.positions, other.positions], dim=1)
        )


class ChoosingLayer(ThoughtLayer):
    """One full-attention layer whose heads choose what leaves.

    Args:
        window: ``W``.
        policy: What leaves.
        index: Which layer of the model it is.
        shared: Where slots are, if they are to stay at their addresses.
    """

    def __init__(self, window: int, policy: EvictionPolicy, index: int = 0, shared: SharedSlots | None = None) -> None:
        super().__init__(window, policy, index, shared)
        # Absolute positions by head, of slots [B, G, W] and of columns.
        self.slot_positions: Tensor | None = None
        self.column_positions: Tensor | None = None
        self._new_positions: Tensor | None = None
        # At rest, and while a call of several tokens runs.
        self.observed: Observed | None = None
        self.recent_observed: Observed | None = None
        # Whether the queries of what comes are wanted, and what attention does with them.
        self.watched = False
        # Which slot each row writes in a step, [B], and at which position.
        self._step: tuple[Tensor, Tensor] | None = None
        self.scaling = 1.0
        self.softcap: float | None = None
        # By row what its heads gave up, [G, m] of each eviction; None: nobody asked.
        self.log: list[list[Tensor]] | None = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be taken back: not where their queries are remembered in place of earlier ones."""
        return not self.policy.observed

    def observe(self, queries: Tensor, scaling: float | None, softcap: float | None) -> None:
        """Remember ``queries [B, H, T, head_dim]`` of the tokens that were written last."""
        count = self.policy.observed
        self.scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = softcap
        new = queries.detach()
        if self.observed is None:
            empty = new.new_zeros(new.shape[0], new.shape[1], count, new.shape[3])
            self._keep(Observed(empty, torch.zeros(new.shape[0], count, dtype=torch.long, device=new.device)))
        if self._step is not None:
            self._observe_token(new, *self._step)
            return
        before = self.recent_observed
        if self._new_positions is None:
            raise RuntimeError("This cache layer was told of no tokens: nothing could have been written to it.")
        thoughts = self._new_positions.shape[1]
        if not thoughts:
            return
        # Not as a view, which would keep the queries of the prompt.
        tokens = Observed(new[:, :, -thoughts:].clone(), self._new_positions.to(new.device))
        self.recent_observed = tokens if before is None else before.last(count).followed_by(tokens)

    def _observe_token(self, queries: Tensor, write: Tensor, positions: Tensor) -> None:
        held = known(self.observed)
        writes, positions = (write != self.window).to(queries.device), positions.to(queries.device)
        moved = Observed(
            torch.cat([held.queries[:, :, 1:], queries], dim=2),
            torch.cat([held.positions[:, 1:], positions[:, None]], dim=1),
        )
        moved = Observed(
            torch.where(writes[:, None, None, None], moved.queries, held.queries),
            torch.where(writes[:, None], moved.positions, held.positions),
        )
        if self.frozen:
            self.observed = moved
        else:
            held.queries.copy_(moved.queries)
            held.positions.copy_(moved.positions)

    # A call of several tokens.

    def unroll(self, how: Unrolling) -> None:
        """Let what stands in slots be columns."""
        super().unroll(how)
        if self.slot_positions is not None:
            there = None if how.slots is None else how.slots.to(self.slot_positions.device)
            self.column_positions = _gathered(self.slot_positions, there, how.columns)
        self.recent_observed = self.observed

    def evict(self, step: int, count: int, drop: int, departing: Departing) -> Evicted:
        """What leaves, ``E = m`` columns."""
        window, positions, choice = joined(self.recent), known(self.column_positions), known(departing.choice)
        observed = None if self.recent_observed is None else self.recent_observed.last(self.policy.observed)
        prompt = joined(self.prompt).keys if self.policy.observed and self.prompt else None
        seen = self._seen(window, positions, observed, prompt, choice.prompt_mask)
        chosen = self._chosen(seen, step, choice.recorded)
        order = (~chosen).long().argsort(dim=-1, stable=True)
        if departing.valid is not None:
            as_it_is = torch.arange(order.shape[-1], device=order.device)
            order = torch.where(departing.valid[..., :1].to(order.device), order, as_it_is)
        self.recent, self.column_positions = (window.gather(order),), positions.gather(2, order)
        evicted = super().evict(step, count, 0, departing)
        left = self.column_positions[..., :count]
        due = [row for row, loses in enumerate(choice.due) if loses]
        self._note(left[due], due)
        self.drop(drop)
        return evicted._replace(positions=left)

    def _seen(
        self,
        window: KeyValue,
        positions: Tensor,
        observed: Observed | None,
        prompt: Tensor | None,
        prompt_mask: Tensor | None,
        valid: Tensor | None = None,
    ) -> Window:
        queries, at = observed if observed is not None and self.policy.observed else (None, None)
        if queries is not None and prompt is None:
            prompt = window.keys[:, :, :0]
        if queries is not None and (
            queries.shape[3] != window.keys.shape[3] or queries.shape[1] % window.keys.shape[1]
        ):
            raise NotImplementedError(
                f"{type(self.policy).__name__} compares queries {tuple(queries.shape)} with keys {tuple(window.keys.shape)}, and this model caches "
                'something else than the keys that its queries meet. Use eviction="key_diff" or "random".'
            )
        device = window.keys.device
        return Window(
            window.keys.detach(),
            window.values.detach(),
            positions,
            self.index,
            valid,
            queries,
            None if at is None else at.to(device),
            None if prompt is None else prompt.detach(),
            None if prompt_mask is None or prompt is None else prompt_mask[:, : prompt.shape[2]].to(device),
            self.scaling,
            self.softcap,
        )

    def _chosen(self, window: Window, evict: int, recorded: Recorded | None, lost: Tensor | None = None) -> Tensor:
        """``[B, G, N]``, True for thoughts that leave: what was ``recorded`` where something was, or what the policy gives up."""
        left = None if recorded is None else recorded.layers.get(self.index)
        if recorded is None or left is None:
            return self.policy.chosen(window, evict, lost)
        left = left.to(window.positions.device)
        if left.shape[1] != window.positions.shape[1]:
            raise ValueError(
                f"`evictions` must be of {window.positions.shape[1]} heads in layer {self.index}, got {left.shape[1]}. Hand on what `generate` returned "
                "for these very sequences."
            )
        there = (window.positions[..., None] == left[:, :, None]).any(dim=-1)
        if window.valid is not None:
            there = there & window.valid
        if recorded.complete:
            return there
        return torch.where((left >= 0).any(dim=-1, keepdim=True), there, self.policy.chosen(window, evict, lost))

    def _note(self, left: Tensor, rows: Sequence[int]) -> None:
        """Keep the positions ``left [B', G, m]`` of what left ``rows``.

        A row that has ended on the device alone loses nothing; what is noted of it comes behind what it has lost.
        """
        # With gradients a layer runs twice, and nothing is noted: `Evictions.of_rows` misses it.
        if self.log is None or self.frozen:
            return
        left = left.int()
        for number, row in enumerate(rows):
            self.log[row].append(left[number])

    def drop(self, columns: int) -> None:
        """Forget the first ``columns`` columns of thoughts."""
        super().drop(columns)
        if columns and self.column_positions is not None:
            self.column_positions = self.column_positions[..., columns:]

    def realign(self, index: Tensor) -> None:
        """Let the columns of thoughts be those at ``index [B, columns]``."""
        super().realign(index)
        if self.column_positions is not None:
            there = index.to(self.column_positions.device)
            self.column_positions = _gathered(self.column_positions, there, index.shape[1])
        if self.recent_observed is not None:
            # Both end with the newest column.
            width = min(self.recent_observed.length, index.shape[1])
            from_last = index[:, index.shape[1] - width :] - index.shape[1] + self.recent_observed.length
            self.recent_observed = self.recent_observed.gather(
                from_last.clamp(min=0).to(self.recent_observed.positions.device)
            )

    def expect(self, prompt: int, positions: Tensor) -> None:
        """Note what comes next: ``prompt`` columns of prompt, then thoughts at the absolute ``positions [B, T]``."""
        super().expect(prompt, positions)
        self._new_positions, self._step = positions, None
        self.watched = self.policy.observed > 0

    def _append(self, new: KeyValue) -> KeyValue:
        seen = super()._append(new)
        positions = self._new_positions
        if positions is not None and positions.shape[1]:
            wide = positions[:, None].expand(-1, new.keys.shape[1], -1).to(new.keys.device)
            held = self.column_positions
            self.column_positions = wide if held is None else torch.cat([held, wide], dim=2)
        return seen

    def keep(self, ending: Ending, prompt: int) -> None:
        """Put the columns of rows that have come to the end of a call into slots, behind a prompt of ``prompt``."""
        super().keep(ending, prompt)
        chosen, device = known(self.column_positions), joined(self.recent).keys.device
        batch = chosen.shape[0]
        rows = None if ending.rows is None else ending.rows.to(device)
        taken = _gathered(_rows(chosen, rows), ending.columns.to(device), self.window)
        self.slot_positions = _put_rows(self.slot_positions, taken, rows, batch)
        self._keep_observed(ending, rows, batch)

    def _keep_observed(self, ending: Ending, rows: Tensor | None, batch: int) -> None:
        held, count = self.recent_observed, self.policy.observed
        if held is None or not count:
            return
        last = held.length - 1 - ending.behind.to(held.positions.device)
        index = (last[:, None] - torch.arange(count - 1, -1, -1, device=last.device)).clamp(min=0)
        taken = held.map(lambda part: _rows(part, rows)).gather(index)
        before = self.observed
        made = [
            _put_rows(None if before is None else before[place], part, rows, batch) for place, part in enumerate(taken)
        ]
        # A step writes into it.
        self._keep(Observed(*made).map(torch.clone))

    def _keep(self, after: Observed) -> None:
        """Let ``after`` be what is remembered at rest."""
        before = self.observed
        if self.static and before is not None:
            after = Observed(*(at_address(old, new) for old, new in zip(before, after, strict=True)))
        if self.static:
            for part in after:
                torch._dynamo.mark_static_address(part)
        self.observed = after

    def rest(self, prompt: int) -> None:
        """Keep the columns of the prompt, ``prompt`` by now, and be at rest."""
        super().rest(prompt)
        self.column_positions, self.recent_observed = None, None

    def replace(self, rows: Tensor, other: ThoughtLayer, prompt: int, batch: int) -> None:
        """Let ``rows [B']`` of ``batch`` be those of ``other``, behind a prompt of ``prompt``."""
        super().replace(rows, other, prompt, batch)
        if not isinstance(other, ChoosingLayer):
            raise TypeError("Rows can be replaced by those of a layer whose heads choose alone.")
        there = rows.to(self.at_rest.keys.device)
        self.slot_positions = _replaced(self.slot_positions, other.slot_positions, there, batch)
        self._replace_observed(there, other, batch)

    def _replace_observed(self, there: Tensor, other: ChoosingLayer, batch: int) -> None:
        """Let what is remembered of the rows ``there [B']`` be what ``other`` remembers, and what they have lost what its rows have."""
        if self.policy.observed and (self.observed or other.observed):
            mine, theirs = self.observed or (None, None), other.observed or (None, None)
            made = [_replaced(old, new, there, batch) for old, new in zip(mine, theirs, strict=True)]
            self._keep(Observed(*map(known, made)))
        if self.log is not None:
            for row, entries in zip(there.tolist(), other.log or [[] for _ in range(len(there))], strict=True):
                self.log[row] = list(entries)

    # One token per row.

    def lose(self, leaving: Leaving, positions: Tensor | None) -> Evicted:
        """A copy of what leaves."""
        self._choose_slots(leaving)
        held = known(self.slot_positions)
        rows = None if leaving.rows is None else leaving.rows.to(held.device)
        there = leaving.slots.to(held.device)
        left = _gathered(_rows(held, rows), there, there.shape[1])
        self._note(left, leaving.places)
        return super().lose(leaving, left)

    def _choose_slots(self, leaving: Leaving) -> None:
        """Let what the policy gives up stand in the slots that are due to be free, and the rest in the others, by age."""
        block, positions = self.at_rest, known(self.slot_positions)
        rows = None if leaving.rows is None else leaving.rows.to(block.keys.device)
        window = rows_of(block.narrow(self.prompt_slots, self.window), rows)
        held = _rows(positions, rows)
        free = leaving.slots.to(held.device)
        # From the oldest on, as columns are, so that equal scores give the same tokens up.
        age = held.argsort(dim=-1)
        seen = self._seen_at_rest(window.gather(age), held.gather(2, age), leaving, rows)
        chosen = self._chosen(seen, free.shape[1], None)
        source = age.gather(2, (~chosen).long().argsort(dim=-1, stable=True))
        slots = (free[:, :1] + torch.arange(self.window, device=held.device)) % self.window
        order = torch.zeros_like(source).scatter(2, slots[:, None].expand_as(source), source)
        if leaving.over is not None:
            as_it_is = torch.arange(self.window, device=held.device)
            order = torch.where(leaving.over.to(held.device)[:, None, None], as_it_is, order)
        in_place = self._in_place(block.keys)
        self.block = put(block, window.gather(order), self.prompt_slots, rows, in_place)
        moved = held.gather(2, order)
        self.slot_positions = moved if rows is None else positions.index_copy(0, rows, moved)

    def _seen_at_rest(
        self, window: KeyValue, positions: Tensor, leaving: Leaving, rows: Tensor | None, valid: Tensor | None = None
    ) -> Window:
        observed = prompt = None
        if self.policy.observed:
            observed = known(self.observed).map(lambda part: _rows(part, rows))
            prompt = _rows(self.at_rest.keys[:, :, : self.prompt_slots], rows)
        return self._seen(window, positions, observed, prompt, leaving.prompt_mask, valid)

    def ready(self, step: Step, write: Tensor) -> None:
        """Be ready for one more token of each row, which goes into the slots ``write [B]`` of this layer."""
        super().ready(step, write)
        block = self.block or self.at_rest
        held = self.slot_positions
        if held is None:
            held = step.write.new_zeros(*block.keys.shape[:2], self.window).to(block.keys.device)
        there = step.write.to(held.device)[:, None, None].expand(-1, held.shape[1], 1)
        new = step.positions.to(held.device)[:, None, None].expand_as(there)
        self.slot_positions = functional.pad(held, (0, 1)).scatter(2, there, new)[..., :-1]
        # The caller's positions may be a view of all that it has counted.
        self._step = (step.write, step.positions.clone()) if self.policy.observed else None
        # Others leave their places before the next eviction; in a graph all steps are one.
        self.watched = self.policy.observed > 0 and (self.static or step.until <= self.policy.observed)

    def write_at(self, slots: Tensor, positions: Tensor) -> None:
        """Let what :meth:`ready` said of the slots and positions ``[B]`` of a step stand at these addresses."""
        self._step = (slots, positions)

    # What all caches can do.

    def fork(self) -> ThoughtLayer:
        """An independent layer with the same content; no tensor is copied, so only one may write to slots."""
        other = copy.copy(self)
        other.log = None if self.log is None else [list(entries) for entries in self.log]
        return other

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held, for counting bytes."""
        parts = [part for part in (self.slot_positions, self.column_positions) if part is not None]
        parts += [part for held in (self.observed, self.recent_observed) for part in held or ()]
        parts += [left for row in self.log or () for left in row]
        return (*super().tensors(), *parts)

    def map(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to everything held; addresses stay where shapes do."""
        super().map(function)
        self.slot_positions = None if self.slot_positions is None else function(self.slot_positions)
        self.column_positions = None if self.column_positions is None else function(self.column_positions)
        if self.observed is not None:
            held = self.observed
            self.observed = held.map(lambda part: at_address(part, function(part)) if self.static else function(part))
        if self.recent_observed is not None:
            self.recent_observed = self.recent_observed.map(function)


def _rows(held: Tensor, rows: Tensor | None) -> Tensor:
    return held if rows is None else held.index_select(0, rows)


def _gathered(positions: Tensor, index: Tensor | None, columns: int) -> Tensor:
    """``positions [B, G, N]`` at ``index [B, columns]``, or the first ``columns``."""
    if index is None:
        return positions[..., :columns]
    return positions.gather(2, index[:, None].expand(-1, positions.shape[1], -1))


def _put_rows(held: Tensor | None, new: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """``held`` of ``batch`` rows, with ``new`` in ``rows``; ``None``: in all."""
    if rows is None:
        return new
    if held is None or held.shape[0] != batch:
        held = new.new_zeros(batch, *new.shape[1:])
    return held.index_copy(0, rows, new)


def _replaced(mine: Tensor | None, theirs: Tensor | None, rows: Tensor, batch: int) -> Tensor | None:
    """``mine`` of ``batch`` rows with ``theirs`` in ``rows``; zeros where there are none."""
    if mine is None and theirs is None:
        return None
    if theirs is None and mine is not None:
        theirs = mine.new_zeros(len(rows), *mine.shape[1:])
    return None if theirs is None else _put_rows(mine, theirs, rows, batch)
