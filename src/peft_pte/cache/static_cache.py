"""`StaticPTECache`: the same cache at fixed addresses, so that a decoding step can be compiled and captured in a graph.

Nothing moves: the thought with index ``n`` stands in slot ``P + n % W``, where the one ``W`` before it stood until it was
evicted. What changes from step to step (the slot to write, which slots hold something, the states) is written between the
steps into tensors that stay where they are; a step only reads them, whatever was evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import PTEConfig
from ..method.state import Evicted, LayerState, Reading
from .cache import PTECache, held_bytes
from .slots import KeyValue
from .thought_layer import ThoughtLayer

# Slots are allocated in multiples of this, so that prompts of about the same length share compiled code.
_SLOTS_MULTIPLE = 64


class StaticThoughtLayer(ThoughtLayer):
    """One full-attention layer: ``P`` prompt slots, then a ring of ``W`` slots for thoughts."""

    is_compileable = True
    is_croppable = False

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.block: KeyValue | None = None
        self.write_slot: Tensor | None = None
        self.seen_tensor: Tensor | None = None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether anything was written."""
        return self.block is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of all slots, ``[B, G, C, head_dim]``."""
        return None if self.block is None else self.block.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of all slots, ``[B, G, C, head_dim]``."""
        return None if self.block is None else self.block.values

    @property
    def capacity(self) -> int:
        """Slots ``C``."""
        return -(-(self.prompt + self.window) // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE

    @property
    def slots(self) -> int:
        """Slots in use while the prompt is written, and all but the one that a query stands for afterwards."""
        return self.seen if self.write_slot is None else self.capacity - 1

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values held, for counting bytes."""
        return () if self.block is None else tuple(self.block)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots for tensors like these."""
        new = (part.new_zeros(*part.shape[:2], self.capacity, part.shape[3]) for part in (key_states, value_states))
        self.block = KeyValue(*new)
        for part in self.block:
            torch._dynamo.mark_static_address(part)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see.

        The prompt may come in pieces; a thought comes alone, into the slot that was announced for it.
        """
        if self.write_slot is not None:
            assert self.block is not None  # For the type checker: a prompt came first.
            self.block.keys.index_copy_(2, self.write_slot, key_states)
            self.block.values.index_copy_(2, self.write_slot, value_states)
            return self.block.keys, self.block.values
        if self.block is None:
            self.lazy_initialization(key_states, value_states)
        assert self.block is not None
        start, self.seen = self.seen, self.seen + key_states.shape[2]
        for block, part in zip(self.block, (key_states, value_states), strict=True):
            block.narrow(2, start, part.shape[2]).copy_(part)
        view = self.block.narrow(0, self.seen)
        return view.keys, view.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use after ``query_length`` more, and the first of them, 0."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens seen, evicted ones and padding included; a tensor where a tracer asks."""
        return self.seen_tensor if torch.compiler.is_compiling() and self.seen_tensor is not None else self.seen

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device; addresses stay where shapes do."""
        if self.block is not None:
            self.block = self.block.map(lambda part: replace(part, function(part)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.block = self.write_slot = self.seen_tensor = None


class Leaving(NamedTuple):
    """Thoughts about to leave a ring."""

    slots: Tensor
    """``[m]``, where they stand."""
    positions: Tensor
    """``[B, 1, m]``, absolute."""
    valid: Tensor | None
    """``[B, 1, m]``, False for padding; ``None``: all valid."""


class StaticPTECache(PTECache):
    """A :class:`PTECache` at fixed addresses, which ``generate`` compiles: ``cache_implementation="static"``.

    For decoding without gradients. Thoughts are written one at a time, so a later turn of a conversation is read token by
    token.

    Args:
        model_config: The config of the (base) model.
        pte_config: The config of the adapter that will use it.

    Attributes:
        read_states: By layer, what its adapters read: ``[B, Q, R]`` in the dtype they compute in.

    Raises:
        NotImplementedError: The eviction policy or the model has no static form.
    """

    def __init__(self, model_config: PreTrainedConfig, pte_config: PTEConfig) -> None:
        super().__init__(model_config, pte_config)
        if self.window is None or not self.policy.uniform:
            raise NotImplementedError(
                "The static form of the cache needs a bounded window from which the oldest thoughts leave, got "
                f"cache_window={self.window}, eviction={pte_config.eviction!r}. Leave `cache_implementation` unset."
            )
        if len(self.thought_layers) < len(self.layers):
            raise NotImplementedError(
                f"{type(model_config).__name__} has layers of sliding attention, for which there is no static form yet. "
                "Leave `cache_implementation` unset."
            )
        layers: list[Any] = [StaticThoughtLayer(self.window) for _ in self.layers]
        self.layers = layers
        self._devices: tuple[torch.device, ...] = ()
        self._forget()

    def share_blocks(self, devices: Sequence[torch.device]) -> None:
        """Allocate the slots of all layers on a device as one block, which one kernel can read at an eviction.

        Args:
            devices: Where each layer is.
        """
        self._devices = tuple(devices)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of a layer; as :meth:`StaticThoughtLayer.update`."""
        layer = self._layers[layer_idx]
        if layer.block is None:
            self._allocate(layer_idx, key_states, value_states)
        return layer.update(key_states, value_states, *args, **kwargs)

    def _allocate(self, index: int, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots of a layer for tensors like these."""
        layer = self._layers[index]
        if not self._devices:
            layer.lazy_initialization(key_states, value_states)
            return
        layer.block = KeyValue(self._slice("keys", index, key_states), self._slice("values", index, value_states))
        for part in layer.block:
            torch._dynamo.mark_static_address(part)

    def _slice(self, kind: str, index: int, like: Tensor) -> Tensor:
        """The slots of one layer in the block of its device; a block of its own where its shape is another."""
        shape = (like.shape[0], like.shape[1], self._layers[index].capacity, like.shape[3])
        there = [other for other, device in enumerate(self._devices) if device == like.device]
        name = (kind, like.device)
        if name not in self.blocks and index in there:
            self.blocks[name] = like.new_zeros(len(there), *shape)
        block = self.blocks.get(name)
        if block is None or block.shape[1:] != shape or block.dtype != like.dtype or index not in there:
            return like.new_zeros(shape)
        return block[there.index(index)]

    def block_of(self, indices: Sequence[int]) -> KeyValue | None:
        """Slots of the layers ``indices``, ``[L, B, G, C, head_dim]``; ``None`` where they are not one block."""
        layers = [self._layers[index] for index in indices]
        found: list[Tensor] = []
        for kind in ("keys", "values"):
            parts = [getattr(layer, kind) for layer in layers]
            first = parts[0]
            block = self.blocks.get((kind, first.device))
            if block is None:
                return None
            step = block.stride(0) * block.element_size()
            start = (first.data_ptr() - block.data_ptr()) // step
            if any(part.data_ptr() != block.data_ptr() + (start + place) * step for place, part in enumerate(parts)):
                return None
            found.append(block[start : start + len(parts)])
        return KeyValue(*found)

    def _forget(self) -> None:
        self.blocks: dict[tuple[str, torch.device], Tensor] = {}
        self.stacked: dict[tuple[int, ...], Tensor] = {}
        self.written = self.held = 0
        # Whether the next call is a step that was announced, with a mask over the slots: a caller's own 4D mask is not one.
        self.step_prepared = False
        self.read_states: dict[int, Tensor] = {}
        self.slot_valid: Tensor | None = None
        self.positions: Tensor | None = None
        self._counters: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def batch(self) -> int:
        """Sequences ``B``."""
        return self._bookkeeping()[0].shape[0]

    @property
    def ring(self) -> int:
        """Slots for thoughts, ``W``."""
        return self.window or 0

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: never, a ring does not know what its slots held before."""
        return False

    @property
    def room(self) -> int:
        """Thoughts that can be written before the next eviction."""
        return self.ring - self.held

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: keys, values, states, bookkeeping."""
        tensors = [*self.state.tensors(), *self.read_states.values()]
        for _, layer in self.thought_layers:
            tensors.extend(layer.tensors())
        rest = (self.slot_valid, self.positions, *self._row_tensors())
        tensors.extend(part for part in rest if part is not None)
        return sum(map(held_bytes, tensors))

    def begin(self, columns: int, mask: Tensor | None, batch: int, device: torch.device) -> None:
        """Say how many columns of prompt come next, before they are written; as :meth:`PTECache.begin`."""
        super().begin(columns, mask, batch, device)
        self._reserve()
        self.slot_valid = torch.zeros(batch, self._layers[0].capacity, dtype=torch.bool, device=device)
        self.slot_valid[:, : self.prompt_length] = True if self.prompt_mask is None else self.prompt_mask
        self.positions = torch.zeros(batch, self.ring, dtype=torch.long, device=device)

    def _reserve(self) -> None:
        """Have slots for all of the prompt; addresses stand still from the first thought on."""
        before = [layer.block for layer in self._layers]
        if all(block is None or block.length >= self._layers[0].capacity for block in before):
            return
        self.blocks = {}
        for index, (layer, held) in enumerate(zip(self._layers, before, strict=True)):
            if held is not None:
                layer.block = None
                self._allocate(index, *held)
                for block, part in zip(layer.tensors(), held, strict=True):
                    block.narrow(2, 0, part.shape[2]).copy_(part)

    def record(self, positions: Tensor, valid: Tensor | None) -> None:
        """Note which thought is about to be written, ``positions [B, 1]``, and announce its slot."""
        slot_valid, ring_positions = self._bookkeeping()
        slot, prompt = self.written % self.ring, self.prompt_length or 0
        if valid is not None:
            new_padding = (~valid).sum(dim=1)
            self.padding = new_padding if self.padding is None else self.padding + new_padding
        ring_positions[:, slot] = positions[:, 0]
        slot_valid[:, prompt + slot] = True if valid is None else valid[:, 0]
        self.written += 1
        self.held += 1
        for layer in self._layers:
            layer.seen += 1
            if layer.write_slot is None:
                assert layer.block is not None  # For the type checker: the prompt was written.
                layer.write_slot, layer.seen_tensor = self._counters_on(layer.block.keys.device)
        for write_slot, seen in self._counters.values():
            write_slot.fill_(prompt + slot)
            seen.fill_(self._layers[0].seen)

    def evicted(self, index: int, leaving: Leaving) -> Evicted:
        """What leaves one layer, a copy."""
        block = self._layers[index].block
        assert block is not None  # For the type checker: the prompt was written.
        there = leaving.slots.to(block.keys.device)
        keys, values = block.keys.index_select(2, there), block.values.index_select(2, there)
        return Evicted(keys, values, leaving.positions, leaving.valid)

    def device_of(self, index: int) -> torch.device:
        """Where the slots of a layer are."""
        block = self._layers[index].block
        assert block is not None  # For the type checker: the prompt was written.
        return block.keys.device

    def value_of(self, index: int) -> Tensor:
        """The state ``S [B, Q, R]`` of a layer."""
        value = self.state.layers[index].value
        assert value is not None  # For the type checker: it was published.
        return value

    def leaving(self) -> Leaving:
        """The ``m`` thoughts that leave next, oldest first."""
        slot_valid, positions = self._bookkeeping()
        start = self.written - self.held
        places = torch.arange(start, start + self.tokens_per_eviction, device=slot_valid.device) % self.ring
        slots = places + (self.prompt_length or 0)
        valid = None if self.padding is None else slot_valid.index_select(1, slots)[:, None]
        return Leaving(slots, positions.index_select(1, places)[:, None], valid)

    def release(self, leaving: Leaving) -> None:
        """Let the slots of ``leaving`` be written again."""
        self._bookkeeping()[0].index_fill_(1, leaving.slots, False)
        self.held -= self.tokens_per_eviction
        self.evictions += 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where queries start, in slots."""
        return self._layers[layer_idx].slots

    def reading(self, index: int) -> Reading | None:
        """What the adapters of a layer read in a step; ``None``: it has none."""
        state = self.read_states.get(index)
        return None if state is None else Reading(state, self.batch, 1, self.adapter or "")

    def publish(self, index: int, value: Tensor, dtype: torch.dtype) -> None:
        """Let ``value [B, Q, R]`` be the state of a layer, and what its adapters read, at the addresses of before."""
        held = self.state.layers[index].value
        if index in self.read_states and held is not None:
            self.read_states[index].copy_(value)
            self.state.layers[index] = LayerState(replace(held, value))
            return
        self.read_states[index] = value.to(dtype=dtype, copy=True)
        torch._dynamo.mark_static_address(self.read_states[index])
        self.state.layers[index] = LayerState(value.clone())

    def stack_states(self, indices: tuple[int, ...]) -> Tensor:
        """The states of the layers ``indices`` as one tensor ``[L, B, Q, R]``, of which each becomes a view."""
        if indices not in self.stacked:
            values = [self.state.layers[index].value for index in indices]
            self.stacked[indices] = torch.stack([value for value in values if value is not None])
            for place, index in enumerate(indices):
                self.state.layers[index] = LayerState(self.stacked[indices][place])
        return self.stacked[indices]

    def make_functional(self) -> None:
        """Refuse: slots at fixed addresses are written in place.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "A static cache is written in place, so no gradient can flow through it. Decode under torch.no_grad(), or score "
            "without a cache."
        )

    def fork(self) -> PTECache:
        """Refuse: there is one place to write to.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("A static cache cannot be forked. Use copy.deepcopy(cache), or a PTECache.")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a ring does not know what its slots held before.

        Raises:
            ValueError: ``tokens_to_remove`` is not zero.
        """
        if int(tokens_to_remove) != 0:
            raise ValueError(
                "A static cache cannot take tokens back. For assisted decoding leave `cache_implementation` unset."
            )

    def to(self, device: torch.device | str) -> PTECache:
        """Move everything to ``device``; returns the cache itself."""
        super().to(device)
        if self._counters:
            self._counters = {}
            for layer in self._layers:
                assert layer.block is not None  # For the type checker: the prompt was written.
                layer.write_slot, layer.seen_tensor = self._counters_on(layer.block.keys.device)
        return self

    def reset(self) -> None:
        """Forget everything; the next call starts with a prompt."""
        super().reset()
        self._forget()

    @property
    def _layers(self) -> list[StaticThoughtLayer]:
        layers: list[Any] = self.layers
        return layers

    def _bookkeeping(self) -> tuple[Tensor, Tensor]:
        assert self.slot_valid is not None  # For the type checker: `begin` came first.
        assert self.positions is not None
        return self.slot_valid, self.positions

    def _counters_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._counters:
            write_slot, seen = (torch.zeros(size, dtype=torch.long, device=device) for size in ((1,), ()))
            for counter in (write_slot, seen):
                torch._dynamo.mark_static_address(counter)
            self._counters[device] = write_slot, seen
        return self._counters[device]

    def _map_rows(self, function: Callable[[Tensor], Tensor], own: Callable[[Any], None]) -> None:
        super()._map_rows(function, own)
        # Rows of a layer may have moved out of what was shared.
        self.stacked = {}
        if self.slot_valid is not None and self.positions is not None:
            self.slot_valid, self.positions = function(self.slot_valid), function(self.positions)
        self.read_states = {index: replace(part, function(part)) for index, part in self.read_states.items()}


def replace(old: Tensor, new: Tensor) -> Tensor:
    """``new``, at the address of ``old`` where it fits."""
    if new.shape != old.shape or new.device != old.device:
        return new
    return old.copy_(new)
