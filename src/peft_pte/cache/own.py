"""Layers that the model keeps itself, beside bounded ones: sliding windows of columns, recurrent and convolution states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from .store import Place

# What a layer of linear attention knows of each of its states.
_STATES = ("conv_states", "recurrent_states")


def own_tensors(layer: Any) -> list[Tensor]:
    """Every tensor of a layer that is the model's own."""
    parts = [entry for part in vars(layer).values() for entry in (part.values() if isinstance(part, dict) else (part,))]
    return [part for part in parts if isinstance(part, Tensor)]


def fork_own(layer: Any) -> Any:
    """A layer of the model's own with the same content; tables are its own, tensors are shared."""
    other = copy.copy(layer)
    for name, part in vars(layer).items():
        if isinstance(part, dict):
            setattr(other, name, dict(part))
    return other


def map_own(layer: Any, function: Callable[[Any], Any]) -> None:
    """Apply ``function``, which acts on the batch axis or on the device, to every tensor, or to what stands in its place."""
    for name, part in vars(layer).items():
        if isinstance(part, (Tensor, Place)):
            setattr(layer, name, function(part))
        elif isinstance(part, dict):
            # Layers of linear attention keep their states by number.
            held = {
                key: function(value) if isinstance(value, (Tensor, Place)) else value for key, value in part.items()
            }
            setattr(layer, name, held)


def select_own(layer: Any, rows: Tensor) -> None:
    """Let the rows of a layer be those at ``rows [B']``."""
    # Linear attention has no other name for it.
    method: Any = layer.reorder_cache if isinstance(layer, LinearAttentionLayer) else layer.batch_select_indices
    keys = getattr(layer, "keys", None)
    method(rows if keys is None else rows.to(keys.device))


def repeat_own(layer: Any, repeats: int) -> None:
    """Repeat every row of a layer ``repeats`` times."""
    if not isinstance(layer, LinearAttentionLayer):
        layer.batch_repeat_interleave(repeats)
        return
    held = [part for part in own_tensors(layer) if part.ndim]
    if held:
        select_own(layer, torch.arange(held[0].shape[0], device=held[0].device).repeat_interleave(repeats))


def replace_own(layer: Any, rows: Tensor, other: Any, batch: int, columns: int) -> None:
    """Let ``rows [B']`` of ``batch`` be those of ``other``, padded in front to ``columns``."""
    if isinstance(layer, LinearAttentionLayer):
        _replace_states(layer, rows, other, batch)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        renumber_own(other, columns)
        keys, values = other.keys, other.values
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (part.new_zeros(batch, *part.shape[1:]) for part in (keys, values))
        renumber_own(layer, columns)
        there = rows.to(keys.device)
        held: tuple[Any, Any] = (layer.keys, layer.values)
        layer.keys, layer.values = (
            mine.index_copy(0, there, new) for mine, new in zip(held, (keys, values), strict=True)
        )


def renumber_own(layer: Any, columns: int) -> None:
    """Let a sliding window be that of the last of ``columns`` columns; those in front of what it holds are padding."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.keys is None or layer.values is None:
        return
    kept = min(columns, layer.sliding_window - 1)
    layer.keys = functional.pad(layer.keys, (0, 0, kept - layer.keys.shape[2], 0))
    layer.values = functional.pad(layer.values, (0, 0, kept - layer.values.shape[2], 0))
    layer.cumulative_length = columns


def _replace_states(layer: Any, rows: Tensor, other: Any, batch: int) -> None:
    for name in _STATES:
        mine, theirs = getattr(layer, name), getattr(other, name)
        for number, new in theirs.items():
            if new is None:
                continue
            held = new.new_zeros(batch, *new.shape[1:]) if mine[number] is None else mine[number]
            mine[number] = held.index_copy(0, rows.to(new.device), new)
        getattr(layer, f"is_{name}_initialized").update(getattr(other, f"is_{name}_initialized"))
    layer.has_previous_state.update(other.has_previous_state)
    layer.conv_kernel_size.update(other.conv_kernel_size)
    layer.device, layer.dtype = other.device, other.dtype
