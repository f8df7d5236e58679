"""`PTECache`: a KV cache of fixed size that hands over what it evicts.

The prompt is never evicted. Thoughts live in ``W`` slots; when one must be written and the window is full, ``m`` leave
together and are queued, per layer, for encoding. The cache carries the thought state of its sequences, and knows nothing
of who encodes.

Towards transformers it is a ``Cache`` whose full-attention layers answer in *slots* where masks are made
(``get_mask_sizes``, ``get_query_offset``) and in absolute tokens where bookkeeping is (``get_seq_length``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .boundary import OpenPrompt, PromptEnds
from .config import PTEConfig
from .eviction import make_policy
from .slots import Place, SlotTable
from .state import ThoughtState
from .thought_layer import ThoughtLayer


class PTECache(Cache):
    """The KV cache of Progressive Thought Encoding, with the thought state of its sequences.

    ``model.generate`` makes one by itself. Make one yourself to keep a conversation, to save it (``torch.save``), or to
    move it (``.to``).

    Args:
        model_config: The config of the (base) model.
        pte_config: The config of the adapter that will use it.

    Attributes:
        prompt_length: Columns of the prompt ``P``, as far as it was seen.
        prompt_ends: First thought column of each row among the columns of its caller, ``[B]``, once it is known.
        open_prompt: What the rule must know of prompts that have not come to their end; ``None``: what follows is thoughts.
        evictions: Evictions so far.
        padding: Columns seen so far that were padding, ``[B]``; ``None``: no mask was given.
        ragged: Whether some sequences ended before others: nothing can be added to those.
        adapter: Name of the adapter whose states these are, once one used the cache.
        state: The thought state of the sequences.

    Raises:
        NotImplementedError: The model has layers whose memory the window cannot bound, or none that grows.
    """

    def __init__(self, model_config: PreTrainedConfig, pte_config: PTEConfig) -> None:
        layers: list[Any] = list(DynamicCache(config=model_config).layers)
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
        self.adapter: str | None = None
        self.evictions = 0
        self.prompt_length: int | None = None
        self.prompt_ends: Tensor | None = None
        self.open_prompt: OpenPrompt | None = None
        self.prompt_mask: Tensor | None = None
        self.padding: Tensor | None = None
        self.ragged = False
        # Validity ``[B, 1, m]`` of what was evicted and can still be seen.
        self._departing: tuple[Tensor, ...] = ()

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
    def missing_prompt(self) -> int:
        """Columns of the prompt that were not written yet."""
        return max((self.prompt_length or 0) - self.get_seq_length(), 0)

    @property
    def holds_thoughts(self) -> bool:
        """Whether a thought was written."""
        return self.prompt_length is not None and self.get_seq_length() > self.prompt_length

    @property
    def room(self) -> int:
        """Thoughts that can be written before the next eviction."""
        _, layer = self.thought_layers[0]
        return layer.window - layer.thoughts

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once anything was evicted."""
        return self.evictions == 0 and all(layer.is_croppable for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: keys, values, states, bookkeeping."""
        tensors: list[Tensor] = [*self.state.tensors()]
        tables = {id(layer.table): layer.table for _, layer in self.thought_layers if layer.has_table}
        for table in tables.values():
            tensors.extend(table.tensors())
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                tensors.extend(layer.tensors())
            else:
                tensors.extend(_own_tensors(layer))
        tensors.extend(self._row_tensors())
        return sum(map(held_bytes, tensors))

    def begin(self, columns: int, mask: Tensor | None, batch: int, device: torch.device) -> None:
        """Say how many columns of prompt come next, before they are written; until the first thought there may be more.

        Args:
            columns: Columns of the prompt, or of its next part, left padding included.
            mask: ``[B, columns]``, False for padding; ``None``: no padding.
            batch: ``B``.
            device: Where positions are kept.
        """
        before = self.prompt_length or 0
        self.prompt_length = before + columns
        if mask is not None or self.prompt_mask is not None:
            parts = ((self.prompt_mask, before), (mask, columns))
            self.prompt_mask = torch.cat([_mask_or_ones(part, batch, width, device) for part, width in parts], dim=1)
            self.padding = (~self.prompt_mask).sum(dim=1)
        shared: SlotTable | None = None
        for _, layer in self.thought_layers:
            shared = shared or SlotTable.empty(batch, 1, layer.window, self.prompt_mask is not None, device)
            layer.begin(self.prompt_length, shared)

    def note_prompt_ends(self, ends: PromptEnds, seen: int, columns: int) -> None:
        """Keep where prompts end, and what the rule must know to go on where they do not.

        Args:
            ends: Of the columns that came last.
            seen: Columns before those.
            columns: How many they are.
        """
        first = torch.full_like(ends.unseen, columns, dtype=torch.long) if ends.first is None else ends.first
        before = self.open_prompt
        known = self.prompt_ends if before is not None else None
        self.prompt_ends = (
            seen + first if known is None or before is None else torch.where(before.rows, seen + first, known)
        )
        self.open_prompt = ends.open if ends.open is not None and bool(ends.open.rows.any()) else None

    def record(self, positions: Tensor, valid: Tensor | None) -> None:
        """Note which thoughts are about to be written: ``positions [B, T]``, ``valid [B, T]`` or ``None``."""
        if valid is not None:
            new_padding = (~valid).sum(dim=1)
            self.padding = new_padding if self.padding is None else self.padding + new_padding
        extended: dict[int, SlotTable] = {}
        for _, layer in self.thought_layers:
            table = layer.table
            if id(table) not in extended:
                extended[id(table)] = table.append(positions, valid)
            layer.hold(extended[id(table)])

    def evict(self, encoded_layers: Collection[int], times: int = 1) -> None:
        """Let ``m`` thoughts leave every layer, ``times`` times over; queue those of ``encoded_layers`` for encoding.

        What leaves after the first time can be seen until :meth:`settle`.
        """
        tables: dict[int, SlotTable] = {}
        for index, layer in self.thought_layers:
            before = layer.table
            evicted = layer.evict(self.policy, self.tokens_per_eviction, times)
            if self.policy.uniform:
                # One table serves all layers, as long as they all lose the same tokens.
                layer.hold(tables.setdefault(id(before), layer.table))
            if index in encoded_layers:
                for part in evicted:
                    self.state.add_pending(index, part)
            self._departing = tuple(part.valid for part in evicted[1:] if part.valid is not None)
        self.evictions += times

    def settle(self) -> None:
        """Drop what was evicted and kept for the tokens of this pass."""
        self._departing = ()
        for _, layer in self.thought_layers:
            layer.settle()

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
        valid_thoughts = table.used()[1]
        kept = valid_thoughts[:, 0] if uniform and valid_thoughts is not None else None
        parts: list[tuple[Tensor | None, int]] = [(valid, length)]
        if layer.slots:
            written = min(layer.slots, layer.prompt)
            prompt_mask = None if self.prompt_mask is None else self.prompt_mask[:, :written]
            departing = torch.cat(self._departing, dim=2)[:, 0] if self._departing else None
            parts = [(prompt_mask, written), (departing, layer.departing), (kept, table.count), *parts]
        if all(mask is None for mask, _ in parts):
            return None
        batch = table.positions.shape[0]
        return torch.cat(
            [_mask_or_ones(mask, batch, columns, table.positions.device) for mask, columns in parts], dim=1
        )

    def make_functional(self) -> None:
        """From now on nothing held is overwritten, so that gradients flow through it (memory then grows with the graph)."""
        for _, layer in self.thought_layers:
            layer.make_functional()

    def make_in_place(self) -> None:
        """From now on slots are written in place again."""
        for _, layer in self.thought_layers:
            layer.make_in_place()

    @property
    def functional(self) -> bool:
        """Whether nothing held is overwritten."""
        return all(layer.functional for _, layer in self.thought_layers)

    def detach_keys_and_values(self) -> None:
        """Cut the graph at the keys and values held; the states keep theirs."""
        self._map_layers(torch.Tensor.detach, lambda layer: _map_own(layer, torch.Tensor.detach))

    def fork(self) -> PTECache:
        """An independent cache with the same content; no tensor is copied, so only one may write to buffers."""
        other = copy.copy(self)
        other.layers = [layer.fork() if isinstance(layer, ThoughtLayer) else copy.copy(layer) for layer in self.layers]
        other.state = self.state.fork()
        return other

    def one_layer(self, index: int) -> PTECache:
        """A cache with nothing but the content of one layer, for that layer alone to run with; no tensor is copied."""
        other = copy.copy(self)
        layer = self.layers[index]
        layers: list[Any] = [_NoLayer()] * len(self.layers)
        other.layers = layers
        other.layers[index] = layer.fork(with_table=False) if isinstance(layer, ThoughtLayer) else copy.copy(layer)
        other.state = ThoughtState(len(self.layers))
        other.state.layers[index] = self.state.layers[index]
        other.prompt_mask = other.padding = other.prompt_ends = other.open_prompt = None
        return other

    def take_layer(self, index: int, other: PTECache) -> None:
        """Let a layer be what it became in ``other``, made by :meth:`one_layer`."""
        layer, after = self.layers[index], other.layers[index]
        if isinstance(layer, ThoughtLayer) and isinstance(after, ThoughtLayer):
            layer.take(after)
        else:
            self.layers[index] = after
        self.state.layers[index] = other.state.layers[index]

    def map_parts(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function`` to every tensor held, or to what stands in its place, in place."""
        self._map_rows(function, lambda layer: _map_own(layer, function))

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
        self.evictions, self.prompt_length, self.prompt_ends, self.open_prompt = 0, None, None, None
        self.prompt_mask, self.padding, self.adapter, self.ragged = None, None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` thoughts back.

        Raises:
            ValueError: An evicted token, or a token of the prompt, would have to come back or go.
        """
        # Some versions of `generate` count in 0-d tensors.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove == 0:
            return super().crop(0)
        if self.evictions:
            raise ValueError(
                f"`tokens_to_remove` must be 0 after an eviction, got {tokens_to_remove}: what was evicted cannot be "
                "brought back. Assisted decoding works until the window is full: use a larger cache_window, or "
                "generate without an assistant."
            )
        thoughts = min((layer.thoughts for _, layer in self.thought_layers), default=self.get_seq_length())
        if tokens_to_remove > 0 or thoughts < -tokens_to_remove:
            raise ValueError(
                f"`tokens_to_remove` must be at most 0 and leave the prompt alone, got {tokens_to_remove}. To start "
                "again use reset()."
            )
        super().crop(tokens_to_remove)
        self._map_tables(lambda table: table.crop(-tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` be what row ``beam_idx[i]`` was, state and all."""
        self._map_rows(
            lambda part: part.index_select(0, beam_idx.to(part.device)), lambda layer: layer.reorder_cache(beam_idx)
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, state and all."""
        self._map_rows(
            lambda part: part.repeat_interleave(repeats, dim=0), lambda layer: layer.batch_repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, state and all."""
        self._map_rows(lambda part: part[indices], lambda layer: layer.batch_select_indices(indices))

    def to(self, device: torch.device | str) -> PTECache:
        """Move everything to ``device``; returns the cache itself."""
        self._map_rows(lambda part: part.to(device), lambda layer: _map_own(layer, lambda part: part.to(device)))
        return self

    def _map_rows(self, function: Callable[[Tensor], Tensor], own: Callable[[Any], None]) -> None:
        """Apply ``function`` to every tensor of ours, and ``own`` to every layer that is the model's own."""
        self._map_layers(function, own)
        self._map_tables(lambda table: table.map(function))
        self.state.map(function)
        for name in ("prompt_mask", "padding", "prompt_ends"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else function(part))
        self.open_prompt = None if self.open_prompt is None else self.open_prompt.map(function)

    def _row_tensors(self) -> tuple[Tensor, ...]:
        """What is kept of the rows beside keys, values and states."""
        parts = (self.prompt_mask, self.padding, self.prompt_ends)
        rest = () if self.open_prompt is None else self.open_prompt.tensors()
        return (*(part for part in parts if part is not None), *rest)

    def _map_layers(self, function: Callable[[Tensor], Tensor], own: Callable[[Any], None]) -> None:
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                layer.map(function)
            else:
                own(layer)

    def _map_tables(self, function: Callable[[SlotTable], SlotTable]) -> None:
        mapped: dict[int, SlotTable] = {}
        for _, layer in self.thought_layers:
            if layer.has_table:
                table = layer.table
                if id(table) not in mapped:
                    mapped[id(table)] = function(table)
                layer.hold(mapped[id(table)])


class _NoLayer:
    """Stands where a layer is not needed."""


def held_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: rows that an expanded tensor repeats are held once."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in axes if stride or not size) * tensor.element_size()


def fingerprint(config: PTEConfig) -> tuple[Any, ...]:
    """What two adapters must share to be able to use one cache."""
    evict = None if config.cache_window is None else config.tokens_per_eviction
    prompt_end = tuple(config.prompt_end) if isinstance(config.prompt_end, list) else config.prompt_end
    fields = ("cache_window", "eviction", "r", "num_global_tokens", "state_update", "encoder_attention", "update_gain")
    ranks = tuple(sorted(config.rank_pattern.items()))
    return (
        evict,
        ranks,
        prompt_end,
        config.key_rotation,
        config.state_address,
        *(getattr(config, name) for name in fields),
    )


def check_cache(cache: Any, config: PTEConfig, adapter: str) -> None:
    """Refuse a cache that the active ``adapter`` cannot use; note that it does.

    Raises:
        TypeError: It is no PTECache.
        ValueError: It is of another adapter, or of another configuration.
    """
    if not isinstance(cache, PTECache):
        raise TypeError(
            f"`past_key_values` must be a PTECache while a PTE adapter is active, got {type(cache).__name__}. Leave it "
            "out in `generate`, or pass PTECache(model.config, pte_config)."
        )
    if cache.fingerprint != fingerprint(config):
        raise ValueError(
            f"`past_key_values` was built for another adapter configuration (window, eviction, prompt end, queries, rank, update): "
            f"{cache.fingerprint}, got {fingerprint(config)} now. Build one with PTECache(model.config, pte_config)."
        )
    if cache.adapter not in (None, adapter):
        raise ValueError(
            f"`past_key_values` holds thoughts of the adapter {cache.adapter!r}, got the adapter {adapter!r} now: neither "
            "can read the other's states. Activate the first again, or start with a cache of its own."
        )
    cache.adapter = adapter


def _own_tensors(layer: Any) -> list[Tensor]:
    """Every tensor of a layer that is the model's own."""
    return [part for part in vars(layer).values() if isinstance(part, Tensor)]


def _map_own(layer: Any, function: Callable[[Any], Any]) -> None:
    for name, part in vars(layer).items():
        if isinstance(part, (Tensor, Place)):
            setattr(layer, name, function(part))


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
