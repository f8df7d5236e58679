"""The thought states after an eviction in plain torch, all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encode.reference import recur_reference, updates_reference

# Layers are taken together up to this many bytes of gathered keys, so that an eviction needs no second cache.
_GATHER_BYTES = 256 * 2**20


def compress_reference(
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    valid: Tensor | None,
    rows: Tensor | None,
    gain: float,
    attention: str,
    rotary_style: str,
) -> None:
    """Overwrites ``state``; arguments as in :func:`peft_pte.ops.compress.api.compress_`."""
    layers, _, heads, _, head_dim = keys.shape
    batch, evicted = slots.shape
    layer_bytes = batch * heads * evicted * head_dim * state.element_size()
    together = max(1, min(layers, _GATHER_BYTES // max(1, layer_bytes)))
    for first in range(0, layers, together):
        part = slice(first, first + together)
        rows_k, rows_v = (_leaving(cached[part], slots, rows).to(state.dtype) for cached in (keys, values))
        if cos is not None and sin is not None:
            rows_k = rotate(rows_k, cos[:, None].to(state.dtype), sin[:, None].to(state.dtype), rotary_style)
        if valid is not None:
            mask = valid[:, None, :, None]
            rows_k, rows_v = torch.where(mask, rows_k, 0.0), torch.where(mask, rows_v, 0.0)
        updates = updates_reference(
            query[part, None].to(state.dtype),
            _flatten_heads(rows_k),
            _flatten_heads(rows_v),
            key_projection[part, None].to(state.dtype),
            value_projection[part, None].to(state.dtype),
            valid,
            attention,
        )
        here = state[part] if rows is None else state[part].index_select(1, rows)
        after = recur_reference(here.flatten(end_dim=1), updates.flatten(end_dim=1)[:, None], gain).view_as(here)
        if rows is None:
            state[part] = after
        else:
            state[part] = state[part].index_copy(1, rows, after)


def _leaving(cached: Tensor, slots: Tensor, due: Tensor | None) -> Tensor:
    """``[L, B', G, E, head_dim]``, what stands in ``slots [B', E]`` of the rows that are due."""
    rows = cached if due is None else cached.index_select(1, due)
    index = slots[None, :, None, :, None].expand(rows.shape[0], -1, rows.shape[2], -1, rows.shape[4])
    return rows.gather(3, index)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """The first ``cos.shape[-1]`` dimensions of ``heads [..., head_dim]`` turned: ``k * cos + turned(k) * sin``."""
    rotary_dim = cos.shape[-1]
    rotated, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    if style == "half":
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([-second, first], dim=-1).flatten(start_dim=-2)
    return torch.cat([rotated * cos + turned * sin, rest], dim=-1)


def _flatten_heads(heads: Tensor) -> Tensor:
    """``[..., G, E, head_dim] -> [..., E, D]``."""
    return heads.transpose(-3, -2).flatten(start_dim=-2)
