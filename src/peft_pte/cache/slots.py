"""Where the keys and values of one layer are kept, and which token stands in which slot.

Two stores, one interface. :class:`SlotBuffer` is a block of fixed size written in place: decoding, where memory must be
constant. :class:`SlotChunks` is an immutable sequence of tensors: scoring with gradients, where a chunk must be able
to run twice from the same start and what it kept must stay what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class KeyValue(NamedTuple):
    """Keys and values ``[B, G, N, head_dim]`` of the same tokens."""

    keys: Tensor
    values: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> KeyValue:
        """Apply ``function`` to both."""
        return KeyValue(function(self.keys), function(self.values))

    def narrow(self, start: int, length: int) -> KeyValue:
        """A view of ``length`` tokens from ``start``."""
        return self.map(lambda part: part.narrow(2, start, length))

    def gather(self, index: Tensor) -> KeyValue:
        """The tokens at ``index [B, G, N']`` of each head."""
        return self.map(lambda part: part.gather(2, index[..., None].expand(-1, -1, -1, part.shape[-1])))

    @property
    def length(self) -> int:
        """Tokens ``N``."""
        return self.keys.shape[2]


@dataclass(frozen=True)
class Place:
    """Stands for a tensor in something taken apart (:mod:`peft_pte.passes.recompute`)."""

    index: int


class SlotBuffer:
    """``capacity`` slots per sequence and head, allocated once, written in place."""

    def __init__(self, like: KeyValue, capacity: int) -> None:
        self.block = like.map(lambda part: part.new_zeros(*part.shape[:2], capacity, part.shape[3]))
        self.length = 0

    def reserve(self, capacity: int) -> None:
        """Have at least ``capacity`` slots: a prompt may come in parts."""
        more = capacity - self.block.length
        if more > 0:
            self.block = self.block.map(lambda part: functional.pad(part, (0, 0, 0, more)))

    def append(self, new: KeyValue) -> None:
        """Write ``new`` behind what is there."""
        for block, part in zip(self.block, new, strict=True):
            block.narrow(2, self.length, part.shape[2]).copy_(part)
        self.length += new.length

    def view(self) -> KeyValue:
        """All tokens held, a view."""
        return self.block.narrow(0, self.length)

    def evict_oldest(self, prompt: int, evict: int) -> KeyValue:
        """Drop the ``evict`` tokens behind the ``prompt`` and close the gap; returns what was dropped."""
        evicted = self.block.narrow(prompt, evict).map(torch.clone)
        kept = self.length - prompt - evict
        for block in self.block:
            block.narrow(2, prompt, kept).copy_(block.narrow(2, prompt + evict, kept).clone())
        self.length -= evict
        return evicted

    def peek(self, start: int, length: int) -> KeyValue:
        """The ``length`` tokens from ``start``, a view."""
        return self.block.narrow(start, length)

    def drop(self, start: int, length: int) -> None:
        """Forget the ``length`` tokens from ``start``."""
        self.evict_oldest(start, length)

    def evict_at(self, prompt: int, evicted: Tensor, kept: Tensor) -> KeyValue:
        """As :meth:`evict_oldest`, for indices ``[B, G, .]`` that count from the end of the prompt."""
        thoughts = self.block.narrow(prompt, self.length - prompt)
        dropped, survivors = thoughts.gather(evicted), thoughts.gather(kept)
        for block, part in zip(self.block, survivors, strict=True):
            block.narrow(2, prompt, part.shape[2]).copy_(part)
        self.length = prompt + survivors.length
        return dropped

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens."""
        self.length -= remove

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, in place."""
        self.block = self.block.map(function)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the store holds, for counting bytes."""
        return tuple(self.block)


class SlotChunks:
    """The same slots as an immutable sequence of tensors: nothing is overwritten, so gradients flow through."""

    def __init__(self, chunks: tuple[KeyValue, ...] = ()) -> None:
        self.chunks = chunks

    @property
    def length(self) -> int:
        """Tokens held."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, new: KeyValue) -> None:
        """Put ``new`` behind what is there."""
        self.chunks = (*self.chunks, new.map(_without_neighbours))

    def view(self) -> KeyValue:
        """All tokens held, in one tensor."""
        if len(self.chunks) == 1:
            return self.chunks[0]
        keys, values = zip(*self.chunks, strict=True)
        return KeyValue(torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def peek(self, start: int, length: int) -> KeyValue:
        """The ``length`` tokens from ``start``."""
        _, after = self._split(start)
        chunks, _ = SlotChunks(after)._split(length)
        return SlotChunks(chunks).view()

    def drop(self, start: int, length: int) -> None:
        """Forget the ``length`` tokens from ``start``."""
        before, after = self._split(start)
        _, kept = SlotChunks(after)._split(length)
        self.chunks = (*before, *kept)

    def evict_oldest(self, prompt: int, evict: int) -> KeyValue:
        """Drop the ``evict`` tokens behind the ``prompt``; returns what was dropped."""
        evicted = self.peek(prompt, evict)
        self.drop(prompt, evict)
        return evicted

    def evict_at(self, prompt: int, evicted: Tensor, kept: Tensor) -> KeyValue:
        """As :meth:`evict_oldest`, for indices ``[B, G, .]`` that count from the end of the prompt."""
        before, after = self._split(prompt)
        thoughts = SlotChunks(after).view()
        self.chunks = (*before, thoughts.gather(kept))
        return thoughts.gather(evicted)

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens."""
        self.chunks, _ = self._split(self.length - remove)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, in place."""
        self.chunks = tuple(chunk.map(function) for chunk in self.chunks)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the store holds, for counting bytes."""
        return tuple(part for chunk in self.chunks for part in chunk)

    def _split(self, at: int) -> tuple[tuple[KeyValue, ...], tuple[KeyValue, ...]]:
        before: list[KeyValue] = []
        after: list[KeyValue] = []
        for chunk in self.chunks:
            head = min(max(at, 0), chunk.length)
            if head > 0:
                before.append(chunk if head == chunk.length else chunk.narrow(0, head))
            if head < chunk.length:
                after.append(chunk if head == 0 else chunk.narrow(head, chunk.length - head))
            at -= chunk.length
        return tuple(before), tuple(after)


def _without_neighbours(part: Tensor) -> Tensor:
    """``part``, not as a view: a layer that projects queries, keys and values at once would keep the queries alive."""
    shares = part.untyped_storage().nbytes() > part.numel() * part.element_size()
    return part.clone() if shares else part


@dataclass(frozen=True)
class SlotTable:
    """Which token stands in each thought slot. Immutable and of constant size, whatever the window holds."""

    positions: Tensor
    """``[B, 1 or G, W]``, absolute positions; 1 where all heads hold the same tokens."""
    valid: Tensor | None
    """``[B, 1 or G, W]``, False for padding; ``None``: all valid."""
    count: int
    """Slots in use."""

    @classmethod
    def empty(cls, batch: int, heads: int, window: int, masked: bool, device: torch.device) -> SlotTable:
        """A table without tokens; ``masked`` where some of the tokens to come may be padding."""
        positions = torch.zeros(batch, heads, window, dtype=torch.long, device=device)
        return cls(positions, torch.zeros_like(positions, dtype=torch.bool) if masked else None, 0)

    def append(self, positions: Tensor, valid: Tensor | None) -> SlotTable:
        """With tokens at ``positions [B, T]`` behind those it holds."""
        end = self.count + positions.shape[1]
        wide = positions[:, None].expand(-1, self.positions.shape[1], -1).to(self.positions.device)
        mask = self.valid
        if mask is None and valid is not None:
            mask = torch.ones_like(self.positions, dtype=torch.bool)
        if mask is not None:
            new = torch.ones_like(wide, dtype=torch.bool) if valid is None else valid[:, None].expand_as(wide)
            new = new.to(mask.device)
            mask = mask.slice_scatter(new, dim=2, start=self.count, end=end)
        return SlotTable(self.positions.slice_scatter(wide, dim=2, start=self.count, end=end), mask, end)

    def used(self) -> tuple[Tensor, Tensor | None]:
        """Positions and validity of the slots in use."""
        return self.positions[..., : self.count], None if self.valid is None else self.valid[..., : self.count]

    def evict_oldest(self, evict: int) -> tuple[Tensor, Tensor | None, SlotTable]:
        """Positions and validity of the first ``evict`` slots, and the table without them."""
        rest = SlotTable(
            functional.pad(self.positions[..., evict:], (0, evict)),
            None if self.valid is None else functional.pad(self.valid[..., evict:], (0, evict)),
            self.count - evict,
        )
        positions, valid = self.used()
        return positions[..., :evict], None if valid is None else valid[..., :evict], rest

    def evict_at(self, evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None, SlotTable]:
        """As :meth:`evict_oldest`, for the slots at the indices ``[B, G, .]``."""
        pad = (0, self.positions.shape[-1] - kept.shape[-1])
        valid = self.valid
        rest = SlotTable(
            functional.pad(self.positions.gather(2, kept), pad),
            None if valid is None else functional.pad(valid.gather(2, kept), pad),
            kept.shape[-1],
        )
        return self.positions.gather(2, evicted), None if valid is None else valid.gather(2, evicted), rest

    def crop(self, remove: int) -> SlotTable:
        """Without the last ``remove`` tokens."""
        return SlotTable(self.positions, self.valid, self.count - remove)

    def map(self, function: Callable[[Tensor], Tensor]) -> SlotTable:
        """With ``function``, which acts on the batch axis or on the device, applied."""
        return SlotTable(function(self.positions), None if self.valid is None else function(self.valid), self.count)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the table holds, for counting bytes."""
        return (self.positions,) if self.valid is None else (self.positions, self.valid)
