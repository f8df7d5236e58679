"""`ThoughtLayer`: the keys and values of one bounded layer.

*At rest* they stand in **slots**, ``P`` of prompt, ``W`` of thoughts and a spare one: the thought ``t`` of a row stands in slot
``P + t % W`` until it is evicted, so each row keeps its own time and nothing moves. A row that has nothing to write writes into the spare
slot, which nobody sees.

*While a call of several tokens runs* they are **columns**, an immutable sequence of tensors: the prompt, and the thoughts of each row
from the oldest to the newest, which is the last column of all rows. Nothing is overwritten, so gradients flow and a chunk can run
twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..eviction.policy import EvictionPolicy
from ..method.state import Evicted

# At fixed addresses slots are allocated in multiples of this, so that prompts of about the same length share compiled code.
_SLOTS_MULTIPLE = 64

Part = TypeVar("Part")


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
        """The tokens at ``index [B, N']``, or ``[B, G, N']`` of each head."""
        heads = index[:, None] if index.ndim == 2 else index
        return self.map(lambda part: part.gather(2, _wide(heads, part)))

    @property
    def length(self) -> int:
        """Tokens ``N``."""
        return self.keys.shape[2]


@dataclass(frozen=True)
class Place:
    """Stands for a tensor in something taken apart (:mod:`peft_pte.passes.recompute`)."""

    index: int


@dataclass(frozen=True)
class Unrolling:
    """How slots become columns."""

    prompt: int
    """``P``."""
    columns: int
    """Columns of thoughts."""
    slots: Tensor | None
    """``[B, columns]``, in which slot of the window each stands; ``None``: in the first ones."""
    written: Tensor
    """``[B]``, thoughts that each row has written."""


@dataclass(frozen=True)
class Ending:
    """Rows that come to the end of a call, and where the columns of their windows go."""

    rows: Tensor | None
    """``[B']``; ``None``: all."""
    columns: Tensor
    """``[B', W]``, the column of thoughts that goes into each slot."""
    behind: Tensor
    """``[B']``, columns behind the last thought."""
    written: Tensor
    """``[B']``, thoughts that they have written."""


@dataclass(frozen=True)
class Recorded:
    """What left at an eviction when a sequence was written, to leave again."""

    layers: dict[int, Tensor]
    """By layer of the model, ``[B, G, m]``, absolute positions; negative in rows that nothing is known of."""
    complete: bool
    """Whether something is known of all rows."""


@dataclass(frozen=True)
class Choice:
    """What heads that choose are told of an eviction out of columns."""

    prompt_mask: Tensor | None
    """``[B, P]``, False where their prompts do not use a slot; ``None``: all do."""
    numbers: Tensor
    """``[B]``, evictions of each row before."""
    first: int
    """The fewest of them among rows that lose anything."""
    due: tuple[bool, ...]
    """Which rows lose anything, as the host knows it."""
    recorded: Recorded | None
    """What is to leave; ``None``: what the policy gives up."""


@dataclass(frozen=True)
class Departing:
    """What evictions take out of columns."""

    positions: Tensor
    """``[B, 1, E]``, absolute, of the oldest; heads that choose have their own."""
    valid: Tensor | None
    """``[B, 1, E]``, False where a row loses nothing; ``None``: all do."""
    choice: Choice | None
    """``None``: nothing is chosen."""


@dataclass(frozen=True)
class Leaving:
    """What an eviction takes out of slots."""

    rows: Tensor | None
    """``[B']``, rows that evict; ``None``: all."""
    slots: Tensor
    """``[B', m]``, slots of the window that they lose, oldest first."""
    over: Tensor | None
    """``[B']``, True for those of them that have ended, and lose nothing; ``None``: none has."""
    written: Tensor
    """``[B']``, thoughts that they have written."""
    prompt_mask: Tensor | None
    """``[B', P]``, False where their prompts do not use a slot; ``None``: all do, or no queries are looked at."""
    first: int
    """Evictions before this one of the row that had fewest, as far as the host knows."""
    places: tuple[int, ...]
    """``rows``, as the host knows them."""


@dataclass(frozen=True)
class Step:
    """What one more token per row does to the slots of a window."""

    leaving: Leaving | None
    """What leaves before; ``None``: nothing."""
    write: Tensor
    """``[B]``, the slot of the window that each row writes; ``W``, the spare one, where it writes nothing."""
    place: Tensor
    """``[B]``, the same counted from the first slot of the prompt."""
    positions: Tensor
    """``[B]``, absolute positions."""
    thoughts: Tensor
    """``[B]``, thoughts that each has written before."""
    until: int
    """Thoughts, this one among them, that the row which evicts next writes before, as far as the host knows; 0 where no queries are looked at."""
    most: int
    """Thoughts, this one among them, of the row that has most, as far as the host knows."""
    slots: int
    """Slots that attention gets."""


class SharedSlots:
    """Slots at fixed addresses: those of all layers on a device are one block, which one kernel can read at an eviction."""

    def __init__(self) -> None:
        self.devices: tuple[torch.device, ...] = ()
        """Where each layer is; empty: each has a block of its own."""
        self.blocks: dict[tuple[str, torch.device], Tensor] = {}

    def slots(self, kind: str, index: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Slots of ``shape`` for a layer; a block of their own where this layer is unlike the others."""
        there = [other for other, device in enumerate(self.devices) if device == like.device]
        name = (kind, like.device)
        block = self.blocks.get(name)
        if there and index == there[0] and (block is None or block.shape[1:] != shape or block.dtype != like.dtype):
            block = self.blocks[name] = like.new_zeros(len(there), *shape)
        alike = block is not None and block.shape[1:] == shape and block.dtype == like.dtype and index in there
        found = block[there.index(index)] if alike and block is not None else like.new_zeros(shape)
        torch._dynamo.mark_static_address(found)
        return found

    def block_of(self, layers: Sequence[KeyValue]) -> KeyValue | None:
        """``[L, B, G, C, head_dim]``, the slots of several layers; ``None`` where they are not side by side."""
        found: list[Tensor] = []
        for kind, parts in zip(("keys", "values"), zip(*layers, strict=True), strict=True):
            block = self.blocks.get((kind, parts[0].device))
            if block is None:
                return None
            step = block.stride(0) * block.element_size()
            start = (parts[0].data_ptr() - block.data_ptr()) // step
            if any(part.data_ptr() != block.data_ptr() + (start + place) * step for place, part in enumerate(parts)):
                return None
            found.append(block[start : start + len(parts)])
        return KeyValue(*found)


class ThoughtLayer(CacheLayerMixin):
    """One full-attention layer: ``P`` prompt slots, then ``W`` slots for thoughts.

    Args:
        window: ``W``.
        policy: What leaves.
        index: Which layer of the model it is.
        shared: Where slots are, if they are to stay at their addresses.
    """

    is_sliding = False
    is_croppable = True
    watched = False
    """Whether it is to be shown the queries of what runs."""
    supports_early_init = False

    def __init__(self, window: int, policy: EvictionPolicy, index: int = 0, shared: SharedSlots | None = None) -> None:
        self.window, self.policy, self.index, self.shared = window, policy, index, shared
        self.static = self.is_compileable = shared is not None
        self.block: KeyValue | None = None
        self.prompt_slots = 0
        self.prompt: tuple[KeyValue, ...] = ()
        self.recent: tuple[KeyValue, ...] = ()
        # What comes next: columns of prompt; or one token per row, and where it is written.
        self.new_prompt = self.unrolled = 0
        self.write: Tensor | None = None
        self.slots = 0
        # What a call writes, in the order of its columns, where other layers are to read it.
        self.written: list[KeyValue] | None = None
        # Whether what stands in slots is to stay what it is, for a backward pass.
        self.frozen = False
        self.seen = 0
        self.seen_tensor: Tensor | None = None

    # The base class has these as plain attributes, which slots are not.
    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether anything was written."""
        return self.block is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of all slots, ``[B, G, C, head_dim]``; ``None`` before anything was kept."""
        return None if self.block is None else self.block.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of all slots, ``[B, G, C, head_dim]``; ``None`` before anything was kept."""
        return None if self.block is None else self.block.values

    @property
    def at_rest(self) -> KeyValue:
        """All slots.

        Raises:
            RuntimeError: Nothing was kept yet.
        """
        if self.block is None:
            raise RuntimeError("This cache layer is empty: nothing was written to it yet.")
        return self.block

    def capacity(self, prompt: int) -> int:
        """Slots ``C`` beside a prompt of ``prompt``, the spare one among them."""
        needed = prompt + self.window + 1
        return -(-needed // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE if self.static else needed

    def observe(self, queries: Tensor, scaling: float | None, softcap: float | None) -> None:
        """See the ``queries [B, H, T, head_dim]`` of the tokens that were written last, where they were asked for."""

    # A call of several tokens.

    def unroll(self, how: Unrolling) -> None:
        """Let what stands in slots be columns."""
        if self.block is None:
            return
        window = self.block.narrow(self.prompt_slots, self.window)
        self.prompt, self.unrolled = (self.block.narrow(0, how.prompt),) if how.prompt else (), how.prompt
        there = None if how.slots is None else how.slots.to(window.keys.device)
        if how.columns:
            self.recent = (window.narrow(0, how.columns) if there is None else window.gather(there),)

    def evict(self, step: int, count: int, drop: int, departing: Departing) -> Evicted:
        """What leaves, from the oldest on; who still sees the columns that are not dropped is up to masks.

        Args:
            step: ``m``.
            count: Columns ``E``, a multiple of ``m``.
            drop: Columns that are gone at once.
            departing: Positions, and rows that lose anything.
        """
        evicted = joined(_narrow(self.recent, 0, count))
        self.drop(drop)
        return Evicted(*evicted, departing.positions, departing.valid)

    @property
    def columns(self) -> int:
        """Columns of thoughts."""
        return sum(part.length for part in self.recent)

    def show(self) -> None:
        """Keep what the call writes, behind the columns that are there now, until :meth:`shown`."""
        self.written = [*self.prompt, *self.recent]

    def shown(self) -> KeyValue:
        """Keys and values of all columns since :meth:`show`, whatever has left since."""
        written, self.written = self.written, None
        return joined(tuple(written or ()))

    def drop(self, columns: int) -> None:
        """Forget the first ``columns`` columns of thoughts."""
        if columns:
            self.recent = _narrow(self.recent, columns, self.columns - columns)

    def realign(self, index: Tensor) -> None:
        """Let the columns of thoughts be those at ``index [B, columns]``."""
        there = index.to(self.recent[0].keys.device)
        self.recent = (joined(self.recent).gather(there),)

    def expect(self, prompt: int, positions: Tensor) -> None:
        """Note what comes next: ``prompt`` columns of prompt, then thoughts at the absolute ``positions [B, T]``."""
        self.new_prompt, self.write = prompt, None

    def keep(self, ending: Ending, prompt: int) -> None:
        """Put the columns of rows that have come to the end of a call into slots, behind a prompt of ``prompt``."""
        window = joined(self.recent)
        there = ending.columns.to(window.keys.device)
        rows = None if ending.rows is None else ending.rows.to(window.keys.device)
        block = self._reserved(window, prompt)
        self.block = put(
            block, rows_of(window, rows).gather(there), prompt, rows, self._in_place(window.keys, block.keys)
        )

    def rest(self, prompt: int) -> None:
        """Keep the columns of the prompt, ``prompt`` by now, and be at rest."""
        if sum(part.length for part in self.prompt) > self.unrolled:
            held = joined(self.prompt)
            block = self._reserved(held, prompt)
            self.block = put(block, held, 0, None, self._in_place(held.keys, block.keys))
        self.prompt, self.recent, self.unrolled = (), (), 0

    def replace(self, rows: Tensor, other: ThoughtLayer, prompt: int, batch: int) -> None:
        """Let ``rows [B']`` of ``batch`` be those of ``other``, behind a prompt of ``prompt``."""
        new = other.at_rest
        there = rows.to(new.keys.device)
        like = new.map(lambda part: part[:1].expand(batch, -1, -1, -1))
        self.block = block = self._reserved(like, prompt)
        in_place = self._in_place(new.keys, block.keys)
        block = put(block, new.narrow(0, other.prompt_slots), 0, there, in_place)
        self.block = put(block, new.narrow(other.prompt_slots, self.window), prompt, there, in_place)

    def _reserved(self, like: KeyValue, prompt: int) -> KeyValue:
        """Slots for a prompt of ``prompt``, with what stands in them already; the window stands behind the prompt."""
        old, first = self.block, self.prompt_slots
        self.prompt_slots = prompt
        same = old is not None and old.keys.shape[0] == like.keys.shape[0]
        if old is not None and same and old.length >= self.capacity(prompt):
            if prompt == first:
                return old
            moved = old.narrow(first, self.window).map(torch.clone)
            return put(old, moved, prompt, None, self._in_place(like.keys, old.keys))
        block = self._allocated(like, self.capacity(prompt))
        if old is None or not same:
            return block
        in_place = self._in_place(like.keys, old.keys)
        block = put(block, old.narrow(0, first), 0, None, in_place)
        return put(block, old.narrow(first, self.window), prompt, None, in_place)

    def _allocated(self, like: KeyValue, capacity: int) -> KeyValue:
        shapes = [(*part.shape[:2], capacity, part.shape[3]) for part in like]
        if self.shared is None:
            return KeyValue(*(part.new_zeros(shape) for part, shape in zip(like, shapes, strict=True)))
        made = zip(("keys", "values"), like, shapes, strict=True)
        return KeyValue(*(self.shared.slots(kind, self.index, part, shape) for kind, part, shape in made))

    # One token per row.

    def lose(self, leaving: Leaving, positions: Tensor | None) -> Evicted:
        """A copy of what leaves, which was at ``positions [B', 1, m]`` where heads do not choose."""
        block = self.at_rest
        there = leaving.slots.to(block.keys.device)
        rows = None if leaving.rows is None else leaving.rows.to(block.keys.device)
        window = rows_of(block.narrow(self.prompt_slots, self.window), rows)
        valid = None if leaving.over is None else (~leaving.over)[:, None, None].expand(-1, 1, there.shape[1])
        return Evicted(*window.gather(there), known(positions), valid)

    def ready(self, step: Step, write: Tensor) -> None:
        """Be ready for one more token of each row, which goes into the slots ``write [B]`` of this layer."""
        block = self.block or self.at_rest
        self.write, self.slots = write.to(block.keys.device), step.slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see."""
        if self.write is None:
            return self._append(KeyValue(key_states, value_states))
        (keys, values), there = self.block or self.at_rest, self.write[:, None, None, None]
        if self.frozen or key_states.requires_grad or keys.requires_grad:
            keys = keys.scatter(2, there.expand_as(key_states), key_states)
            values = values.scatter(2, there.expand_as(value_states), value_states)
            self.block = KeyValue(keys, values)
        else:
            keys.scatter_(2, there.expand_as(key_states), key_states)
            values.scatter_(2, there.expand_as(value_states), value_states)
        if self.static:
            return keys, values
        return keys.narrow(2, 0, self.slots), values.narrow(2, 0, self.slots)

    def _append(self, new: KeyValue) -> KeyValue:
        seen, count = joined((*self.prompt, *self.recent, new)), self.new_prompt
        if self.written is not None:
            self.written.append(new)
        new = new.map(_without_neighbours)
        if count:
            self.prompt = (*self.prompt, new if count == new.length else new.narrow(0, count))
        if count < new.length:
            self.recent = (*self.recent, new.narrow(count, new.length - count) if count else new)
        return seen

    def _in_place(self, *tensors: Tensor) -> bool:
        """Whether slots may be written in place: not where a gradient flows through them, or views of them may be saved for one."""
        return not self.frozen and not any(tensor.requires_grad for tensor in tensors)

    # What all caches can do.

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held, for counting bytes."""
        return (*(self.block or ()), *(part for pair in (*self.prompt, *self.recent) for part in pair))

    def fork(self) -> ThoughtLayer:
        """An independent layer with the same content; no tensor is copied, so only one may write to slots."""
        return copy.copy(self)

    def take(self, other: ThoughtLayer) -> None:
        """Become what ``other``, a fork of this layer, became."""
        self.__dict__.update(other.__dict__)

    def map(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to everything held; addresses stay where shapes do."""
        if self.block is not None:
            self.block = self.block.map(
                lambda part: at_address(part, function(part)) if self.static else function(part)
            )
        self.prompt = tuple(pair.map(function) for pair in self.prompt)
        self.recent = tuple(pair.map(function) for pair in self.recent)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One slot: the masks of bounded layers are made chunk by chunk, and what the host makes for them is not used."""
        return 1, 0

    def get_seq_length(self, *args: Any) -> Any:
        """Tokens seen, evicted ones and padding included; a tensor where a tracer asks."""
        return self.seen_tensor if torch.compiler.is_compiling() and self.seen_tensor is not None else self.seen

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Slots are made when the prompt is known."""

    def reset(self) -> None:
        """Forget everything; slots at fixed addresses stay there."""
        block = self.block if self.static else None
        self.__init__(self.window, self.policy, self.index, self.shared)  # type: ignore[misc]
        self.block = block

    def crop(self, tokens_to_remove: int) -> None:
        """What was taken back is overwritten by what comes next: the cache counts."""


def at_address(old: Any, new: Any) -> Any:
    """``new``, at the address of ``old`` where it fits."""
    if isinstance(new, Place) or new.shape != old.shape or new.device != old.device:
        return new
    return old.copy_(new)


def joined(parts: tuple[KeyValue, ...]) -> KeyValue:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return KeyValue(torch.cat(keys, dim=2), torch.cat(values, dim=2))


def rows_of(held: KeyValue, rows: Tensor | None) -> KeyValue:
    """The rows ``rows [B']`` of ``held``; ``None``: all."""
    return held if rows is None else held.map(lambda part: part.index_select(0, rows))


def known(part: Part | None) -> Part:
    """``part``, of a layer that was written to.

    Raises:
        RuntimeError: It is not there.
    """
    if part is None:
        raise RuntimeError("This cache layer lacks what it needs: nothing was written to it yet.")
    return part


def put(block: KeyValue, new: KeyValue, start: int, rows: Tensor | None, in_place: bool) -> KeyValue:
    """``block`` with ``new`` from slot ``start`` on, in ``rows [B']`` or in all."""
    stop = start + new.length
    if in_place:
        for part, more in zip(block, new, strict=True):
            if rows is None:
                part.narrow(2, start, new.length).copy_(more)
            else:
                part[rows, :, start:stop] = more
        return block
    if rows is None:
        pairs = zip(block, new, strict=True)
        return KeyValue(*(part.slice_scatter(more, dim=2, start=start, end=stop) for part, more in pairs))
    inside = block.narrow(start, new.length)
    pairs = zip(inside, new, strict=True)
    return put(block, KeyValue(*(part.index_copy(0, rows, more) for part, more in pairs)), start, None, False)


def _narrow(parts: tuple[KeyValue, ...], start: int, length: int) -> tuple[KeyValue, ...]:
    """``length`` columns of ``parts`` from ``start``, as views."""
    taken: list[KeyValue] = []
    for part in parts:
        first, last = max(start, 0), min(start + length, part.length)
        if first < last:
            taken.append(part if last - first == part.length else part.narrow(first, last - first))
        start -= part.length
    return tuple(taken)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, like.shape[1], -1, like.shape[3])


def _without_neighbours(part: Tensor) -> Tensor:
    """``part``, not as a view: a layer that projects queries, keys and values at once would keep the queries alive."""
    shares = part.untyped_storage().nbytes() > part.numel() * part.element_size()
    return part.clone() if shares else part
