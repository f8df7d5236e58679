"""`PTECache`: a KV cache of fixed size that hands over what it evicts.

The prompt is never evicted. Thoughts live in ``W`` slots; when one must be written and the window is full, ``m`` leave
together and are queued, per layer, for encoding. The cache carries the thought state of its sequences, and knows nothing
of who encodes.

Towards transformers it is a ``Cache`` whose full-attention layers answer in *slots* where masks are made
(``get_mask_sizes``, ``get_query_offset``) and in absolute tokens where bookkeeping is (``get_seq_length``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .config import PTEConfig
from .eviction import EvictionPolicy, make_policy
from .slots import KeyValue, SlotBuffer, SlotChunks, SlotTable
from .state import Evicted, ThoughtState


class ThoughtLayer(CacheLayerMixin):
    """One full-attention layer: ``P`` prompt slots, then ``W`` slots for thoughts."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int) -> None:
        self.window = window
        self.prompt = 0
        self.seen = 0
        self.differentiable = False
        self.store: SlotBuffer | SlotChunks | None = None
        self.table: SlotTable | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether anything was written."""
        return self.store is not None

    @property
    def keys(self) -> Tensor | None:
        """Keys in use, ``[B, G, slots, head_dim]``."""
        return None if self.store is None else self.store.view().keys

    @property
    def values(self) -> Tensor | None:
        """Values in use, ``[B, G, slots, head_dim]``."""
        return None if self.store is None else self.store.view().values

    @property
    def slots(self) -> int:
        """Slots in use."""
        return 0 if self.store is None else self.store.length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all ``P + W`` slots for tensors like these (with gradients: none, they are kept as they come)."""
        like = KeyValue(key_states, value_states)
        self.store = SlotChunks() if self.differentiable else SlotBuffer(like, self.prompt + self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see.

        Raises:
            RuntimeError: The window cannot take ``T`` more tokens: the model was called past its adapted backbone.
        """
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        new = KeyValue(key_states, value_states)
        if self.slots + new.length > self.prompt + self.window:
            raise RuntimeError(
                f"A PTECache of {self.prompt + self.window} slots got {new.length} tokens beside the {self.slots} it "
                "holds. Call the adapted model itself: it evicts before it writes."
            )
        self.store.append(new)
        self.seen += new.length
        return tuple(self.store.view())

    def make_differentiable(self) -> None:
        """From now on keep tensors as they come, so that gradients flow through them."""
        self.differentiable = True
        if isinstance(self.store, SlotBuffer):
            self.store = SlotChunks((self.store.view(),))

    def evict(self, policy: EvictionPolicy, evict: int) -> Evicted:
        """Let ``evict`` thoughts leave, as ``policy`` says."""
        if policy.uniform:
            positions, valid, self.table = self.table.evict_oldest(evict)
            return Evicted(*self.store.evict_oldest(self.prompt, evict), positions, valid)
        keys = self.store.view().keys[:, :, self.prompt :]
        table = self.table.map(lambda part: part.expand(-1, keys.shape[1], -1))
        leave, stay = policy.select(keys, table.used()[1], evict)
        positions, valid, self.table = table.evict_at(leave, stay)
        return Evicted(*self.store.evict_at(self.prompt, leave, stay), positions, valid)

    def fork(self) -> ThoughtLayer:
        """An independent layer with the same content; no tensor is copied, so only one may write to a buffer."""
        other = copy.copy(self)
        if isinstance(self.store, SlotChunks):
            other.store = SlotChunks(self.store.chunks)
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to keys and values, in place."""
        if self.store is not None:
            self.store.map(function)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use after ``query_length`` more, and the first of them, 0."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.prompt = self.seen = 0
        self.store = self.table = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove != 0 and self.store is not None:
            self.store.crop(-tokens_to_remove)
            self.seen += tokens_to_remove


class PTECache(Cache):
    """The KV cache of Progressive Thought Encoding, with the thought state of its sequences.

    ``model.generate`` makes one by itself. Make one yourself to keep a conversation, to save it (``torch.save``), or to
    move it (``.to``).

    Args:
        model_config: The config of the (base) model.
        pte_config: The config of the adapter that will use it.

    Attributes:
        prompt_length: Columns of the prompt ``P``, once it is known.
        prompt_limit: Columns after which the first call holds thoughts already (assisted decoding sends its first
            candidates along with the prompt); ``None``: the first call is the prompt.
        evictions: Evictions so far.
        state: The thought state of the sequences.

    Raises:
        NotImplementedError: The model has layers whose memory the window cannot bound, or none that grows.
    """

    def __init__(self, model_config: PreTrainedConfig, pte_config: PTEConfig) -> None:
        layers = list(DynamicCache(config=model_config).layers)
        self.window = pte_config.cache_window
        if self.window is not None:
            layers = [_bounded(layer, index, self.window) for index, layer in enumerate(layers)]
            if not any(isinstance(layer, ThoughtLayer) for layer in layers):
                raise NotImplementedError(
                    f"`cache_window` has nothing to bound: every layer of {type(model_config).__name__} already has "
                    "memory of fixed size. Use PTEConfig(cache_window=None), or plain LoRA."
                )
            self.tokens_per_eviction = pte_config.tokens_per_eviction
        super().__init__(layers=layers)
        self.policy = make_policy(pte_config.eviction)
        self.fingerprint = fingerprint(pte_config)
        self.state = ThoughtState(len(layers))
        self.evictions = 0
        self.prompt_length: int | None = None
        self.prompt_limit: int | None = None
        self.prompt_mask: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"PTECache(window={self.window}, prompt_length={self.prompt_length}, seen={self.get_seq_length()}, "
            f"evictions={self.evictions})"
        )

    @property
    def thought_layers(self) -> list[tuple[int, ThoughtLayer]]:
        """The bounded layers, with their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, ThoughtLayer)]

    @property
    def room(self) -> int:
        """Thoughts that can be written before the next eviction."""
        _, layer = self.thought_layers[0]
        return layer.window - (0 if layer.table is None else layer.table.count)

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once anything was evicted."""
        return self.evictions == 0 and all(layer.is_croppable for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: keys, values, states, bookkeeping."""
        tensors: list[Tensor] = [*self.state.tensors()]
        tables = {id(layer.table): layer.table for _, layer in self.thought_layers if layer.table is not None}
        for table in tables.values():
            tensors.extend(table.tensors())
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                tensors.extend(() if layer.store is None else layer.store.tensors())
            else:
                tensors.extend(part for part in (layer.keys, layer.values) if part is not None)
        if self.prompt_mask is not None:
            tensors.append(self.prompt_mask)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def begin(self, prompt_length: int, prompt_mask: Tensor | None, batch: int, device: torch.device) -> None:
        """Say where the prompt ends, before it is written.

        Args:
            prompt_length: ``P``, columns of the prompt, left padding included.
            prompt_mask: ``[B, P]``, False for padding; ``None``: no padding.
            batch: ``B``.
            device: Where positions are kept.
        """
        self.prompt_length, self.prompt_mask = prompt_length, prompt_mask
        shared: SlotTable | None = None
        for _, layer in self.thought_layers:
            shared = shared or SlotTable.empty(batch, 1, layer.window, prompt_mask is not None, device)
            layer.prompt, layer.table = prompt_length, shared

    def record(self, positions: Tensor, valid: Tensor | None) -> None:
        """Note which thoughts are about to be written: ``positions [B, T]``, ``valid [B, T]`` or ``None``."""
        extended: dict[int, SlotTable] = {}
        for _, layer in self.thought_layers:
            table = layer.table
            if id(table) not in extended:
                extended[id(table)] = table.append(positions, valid)
            layer.table = extended[id(table)]

    def evict(self, encoded_layers: Collection[int]) -> None:
        """Let ``m`` thoughts leave every layer; queue those of ``encoded_layers`` for encoding."""
        tables: dict[int, SlotTable] = {}
        for index, layer in self.thought_layers:
            before = layer.table
            evicted = layer.evict(self.policy, self.tokens_per_eviction)
            if self.policy.uniform:
                # One table serves all layers, as long as they all lose the same tokens.
                layer.table = tables.setdefault(id(before), layer.table)
            if index in encoded_layers:
                self.state.add_pending(index, evicted)
        self.evictions += 1

    def slot_mask(self, valid: Tensor | None, length: int) -> Tensor | None:
        """The 2D mask ``[B, slots + T]`` of the full-attention layers, in slot order, before ``T`` tokens are written.

        ``None`` where nothing is padding. Where heads hold different tokens, kept thoughts count as real: a sequence
        has padding among its thoughts only after its end, where nothing real looks back on it.

        Args:
            valid: ``[B, T]``, False for padding; ``None``: no padding.
            length: ``T``.
        """
        _, layer = self.thought_layers[0]
        table = layer.table
        uniform = table.positions.shape[1] == 1
        kept = table.used()[1][:, 0] if uniform and table.valid is not None else None
        parts = [(valid, length)]
        if layer.slots:
            parts = [(self.prompt_mask, self.prompt_length), (kept, table.count), *parts]
        if all(mask is None for mask, _ in parts):
            return None
        batch = table.positions.shape[0]
        return torch.cat(
            [_mask_or_ones(mask, batch, columns, table.positions.device) for mask, columns in parts], dim=1
        )

    def make_differentiable(self) -> None:
        """From now on gradients flow through what is written (memory then grows with the graph)."""
        for _, layer in self.thought_layers:
            layer.make_differentiable()

    def detach_keys_and_values(self) -> None:
        """Cut the graph at the keys and values held; the states keep theirs."""
        self._map_layers(torch.Tensor.detach)

    def fork(self) -> PTECache:
        """An independent cache with the same content; no tensor is copied, so only one may write to buffers."""
        other = copy.copy(self)
        other.layers = [layer.fork() if isinstance(layer, ThoughtLayer) else copy.copy(layer) for layer in self.layers]
        other.state = self.state.fork()
        return other

    def adopt(self, other: PTECache) -> None:
        """Become what ``other``, a fork of this cache, became."""
        self.__dict__.update(other.__dict__)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where queries start: in slots for the bounded layers."""
        layer = self.layers[layer_idx]
        return layer.slots if isinstance(layer, ThoughtLayer) else super().get_query_offset(layer_idx)

    def reset(self) -> None:
        """Forget everything; the next call starts with a prompt."""
        super().reset()
        self.state.reset()
        self.evictions, self.prompt_length, self.prompt_mask = 0, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` thoughts back.

        Raises:
            ValueError: An evicted token, or a token of the prompt, would have to come back or go.
        """
        if tokens_to_remove == 0:
            return super().crop(0)
        if self.evictions:
            raise ValueError(
                f"`tokens_to_remove` must be 0 after an eviction, got {tokens_to_remove}: what was evicted cannot be "
                "brought back. Assisted decoding works until the window is full: use a larger cache_window, or "
                "generate without an assistant."
            )
        if tokens_to_remove > 0 or (self.window is not None and self.window - self.room < -tokens_to_remove):
            raise ValueError(
                f"`tokens_to_remove` must be at most 0 and leave the prompt alone, got {tokens_to_remove}. To start "
                "again use reset()."
            )
        super().crop(tokens_to_remove)
        self._map_tables(lambda table: table.crop(-tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` be what row ``beam_idx[i]`` was, state and all."""
        self._map_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, state and all."""
        self._map_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, state and all."""
        self._map_rows(lambda part: part[indices])

    def to(self, device: torch.device | str) -> PTECache:
        """Move everything to ``device``; returns the cache itself."""
        self._map_rows(lambda part: part.to(device))
        return self

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self._map_layers(function)
        self._map_tables(lambda table: table.map(function))
        self.state.map(function)
        self.prompt_mask = None if self.prompt_mask is None else function(self.prompt_mask)

    def _map_layers(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                layer.map(function)
            elif layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = function(layer.keys), function(layer.values)

    def _map_tables(self, function: Callable[[SlotTable], SlotTable]) -> None:
        mapped: dict[int, SlotTable] = {}
        for _, layer in self.thought_layers:
            if layer.table is not None:
                table = layer.table
                layer.table = mapped[id(table)] if id(table) in mapped else function(table)
                mapped[id(table)] = layer.table


def fingerprint(config: PTEConfig) -> tuple[Any, ...]:
    """What two adapters must share to be able to use one cache."""
    evict = None if config.cache_window is None else config.tokens_per_eviction
    ranks = tuple(sorted(config.rank_pattern.items()))
    return (config.cache_window, evict, config.eviction, config.num_queries, config.r, ranks, config.state_update)


def _mask_or_ones(mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    return torch.ones(batch, columns, dtype=torch.bool, device=device) if mask is None else mask.bool()


def _bounded(layer: CacheLayerMixin, index: int, window: int) -> CacheLayerMixin:
    if type(layer) is DynamicLayer:
        return ThoughtLayer(window)
    if type(layer) is DynamicSlidingWindowLayer:
        return layer
    raise NotImplementedError(
        f"`cache_window` cannot bound a model whose layer {index} keeps a {type(layer).__name__}: full attention gets the "
        "window and sliding attention keeps its own, anything else would have to be replayed in segments too. Use "
        "PTEConfig(cache_window=None), or a model of full and sliding attention."
    )
