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
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from ..config import PTEConfig
from ..method.state import ThoughtState
from .eviction import make_policy
from .slots import Place, SlotTable
from .thought_layer import ThoughtLayer


class RowTensors(Protocol):
    """What is kept of the rows, in tensors whose first axis they are."""

    def map(self, function: Callable[[Tensor], Tensor]) -> RowTensors:
        """The same with ``function`` applied to every tensor."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""


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
        interrupted: Whether a call that wrote to it did not come to its end: its layers hold different tokens.
        adapter: Name of the adapter whose states these are, once one used the cache.
        running: The pass that writes to it (:class:`peft_pte.passes.block.Pass`), while one runs.
        state: The thought state of the sequences.

    Raises:
        NotImplementedError: The model has layers whose memory the window cannot bound, or none that grows.
    """

    step_prepared = False

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
        self.open_prompt: RowTensors | None = None
        self.prompt_mask: Tensor | None = None
        self.padding: Tensor | None = None
        self.ragged = False
        self.interrupted = False
        self.running: Any = None

    def __repr__(self) -> str:
        return (
            f"PTECache(window={self.window}, prompt_length={self.prompt_length}, seen={self.get_seq_length()}, "
            f"evictions={self.evictions})"
        )

    @property
    def continuable(self) -> bool:
        """Whether every layer can go on from what it holds with gradients: a recurrent state is overwritten in place."""
        return not any(isinstance(layer, LinearAttentionLayer) for layer in self.layers)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens seen, evicted ones and padding included; all layers saw the same."""
        if layer_idx is None:
            layer_idx = next((index for index, _ in self.thought_layers), 0)
        return super().get_seq_length(layer_idx)

    @property
    def thought_layers(self) -> list[tuple[int, ThoughtLayer]]:
        """The bounded layers, with their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, ThoughtLayer)]

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

    def fork(self) -> PTECache:
        """An independent cache with the same content; no tensor is copied, so only one may write to buffers."""
        other = copy.copy(self)
        other.layers = [layer.fork() if isinstance(layer, ThoughtLayer) else _fork_own(layer) for layer in self.layers]
        other.state = self.state.fork()
        return other

    def one_layer(self, index: int) -> PTECache:
        """A cache with nothing but the content of one layer, for that layer alone to run with; no tensor is copied."""
        other = copy.copy(self)
        layer = self.layers[index]
        layers: list[Any] = [_NoLayer()] * len(self.layers)
        other.layers = layers
        other.layers[index] = (
            layer.fork(with_table=not self.policy.uniform) if isinstance(layer, ThoughtLayer) else _fork_own(layer)
        )
        other.state = ThoughtState(len(self.layers))
        other.state.layers[index] = self.state.layers[index]
        # Nor the pass, which may keep this one: a circle would hold its masks until the garbage collector comes by.
        other.prompt_mask = other.padding = other.prompt_ends = other.open_prompt = other.running = None
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

    def reset(self) -> None:
        """Forget everything; the next call starts with a prompt."""
        super().reset()
        self.state.reset()
        self.evictions, self.prompt_length, self.prompt_ends, self.open_prompt = 0, None, None, None
        self.prompt_mask, self.padding, self.adapter, self.ragged = None, None, None, False
        self.interrupted = False

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
    parts = [entry for part in vars(layer).values() for entry in (part.values() if isinstance(part, dict) else (part,))]
    return [part for part in parts if isinstance(part, Tensor)]


def _fork_own(layer: Any) -> Any:
    """A layer of the model's own with the same content; tables are its own, tensors are shared."""
    other = copy.copy(layer)
    for name, part in vars(layer).items():
        if isinstance(part, dict):
            setattr(other, name, dict(part))
    return other


def _map_own(layer: Any, function: Callable[[Any], Any]) -> None:
    for name, part in vars(layer).items():
        if isinstance(part, (Tensor, Place)):
            setattr(layer, name, function(part))
        elif isinstance(part, dict):
            # Layers of linear attention keep their states by number.
            held = {
                key: function(value) if isinstance(value, (Tensor, Place)) else value for key, value in part.items()
            }
            setattr(layer, name, held)


def _mask_or_ones(mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    return torch.ones(batch, columns, dtype=torch.bool, device=device) if mask is None else mask.bool()


def _bounded(layer: Any, index: int, window: int) -> Any:
    if type(layer) is DynamicLayer:
        return ThoughtLayer(window)
    if type(layer) in (DynamicSlidingWindowLayer, LinearAttentionLayer):
        return layer
    raise NotImplementedError(
        f"`cache_window` cannot bound a model whose layer {index} keeps a {type(layer).__name__}: full attention gets the "
        "window, sliding and linear attention keep what they keep. Use a model of such layers, or "
        "PTEConfig(cache_window=None)."
    )
