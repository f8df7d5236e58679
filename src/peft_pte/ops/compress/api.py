"""``compress_``: what an eviction does to the thought states while decoding, whoever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...shapes import (
    CachedHeads,
    CosSin,
    DueRows,
    EvictedSlots,
    LayerProjections,
    LayerQueries,
    LayerStates,
    LeavingValid,
    checked,
)
from ...updates import implementation_of
from ..implementation import resolve_impl

ROTARY_STYLES = ("half", "interleaved")


@checked
def compress_(
    state: LayerStates,
    keys: CachedHeads,
    values: CachedHeads,
    slots: EvictedSlots,
    query: LayerQueries,
    key_projection: LayerProjections,
    value_projection: LayerProjections,
    cos: CosSin | None = None,
    sin: CosSin | None = None,
    valid: LeavingValid | None = None,
    *,
    rows: DueRows | None = None,
    gain: float = 0.3,
    attention: str = "linear",
    rotary_style: str = "half",
    impl: str = "auto",
) -> None:
    """``S <- Norm(S + gain * enc(K_e, V_e))`` in every layer, in place, straight from the slots of the cache.

    The same function of the same tokens as :func:`peft_pte.ops.encode`, without gradients: keys are un-rotated as they
    are read, and the queries are folded into the keys' space once, so that no key is projected. Computed in float64 for
    a float64 ``state`` and in float32 otherwise, outside any autocast.

    Args:
        state: ``S [L, B, Q, R]``, overwritten; any strides.
        keys: ``[L, B, G, C, head_dim]``, rotated as cached; any strides, the last axis contiguous.
        values: ``[L, B, G, C, head_dim]``, likewise.
        slots: ``[B', E]`` int64, which slots of each row leave, the same for every layer and head. Not checked against ``C``.
        query: ``W_Q h_g [L, Q, R]``.
        key_projection: ``W_K [L, R, D]``, ``D = G * head_dim`` with heads side by side.
        value_projection: ``W_V [L, R, D]``.
        cos: ``[B', E, rotary_dim]`` of the *inverse* rotation of the first ``rotary_dim`` dimensions of each head:
            ``k * cos + rotate(k) * sin``. Both entries of a pair must be equal, as transformers has them. For cosines
            and sines that carry an attention scaling ``a``, pass ``cos / a**2`` and ``-sin / a**2``. ``None``: keys
            are taken as cached.
        sin: ``[B', E, rotary_dim]``, likewise.
        valid: ``[B', E]``, False for padding, which contributes exactly zero whatever its slots hold. ``None``: all
            valid.
        rows: ``[B']`` int64, the rows that are due: no other is read or written. ``None``: all.
        gain: Factor on the update.
        attention: ``"linear"``, ``"softmax"`` or ``"slots"``, as in :func:`peft_pte.ops.encode`.
        rotary_style: Which dimensions are a pair: ``"half"`` (``i`` and ``i + rotary_dim / 2``, Llama) or
            ``"interleaved"`` (``2 i`` and ``2 i + 1``, GPT-J, Cohere).
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: A choice is none of the above, or a shape or layout contradicts the others.
        NotImplementedError: ``impl`` cannot run on the device of ``state``.
    """
    impl = implementation_of(attention, impl)
    _check(state, keys, values, key_projection, cos, sin, rotary_style)
    due = state.shape[1] if rows is None else rows.shape[0]
    if slots.shape[0] != due:
        raise ValueError(f"`slots` must have one row for each of the {due} rows that are due, got {slots.shape[0]}.")
    if resolve_impl(impl, state.device, "compress", keys.dtype, due) == "triton":
        from .triton import compress_triton as compute
    else:
        from .reference import compress_reference as compute
    with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
        compute(
            state,
            keys,
            values,
            slots,
            query,
            key_projection,
            value_projection,
            cos,
            sin,
            valid,
            rows,
            gain,
            attention,
            rotary_style,
        )


def _check(
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary_style: str,
) -> None:
    if rotary_style not in ROTARY_STYLES:
        raise ValueError(f"`rotary_style` must be one of {ROTARY_STYLES}, got {rotary_style!r}.")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`state` must be float32 or float64, got {state.dtype}. Keep thought states in float32.")
    heads, head_dim = keys.shape[2], keys.shape[4]
    if key_projection.shape[-1] != heads * head_dim:
        raise ValueError(
            f"`key_projection` must have {heads * head_dim} columns for {heads} heads of {head_dim}, got "
            f"{key_projection.shape[-1]}."
        )
    for name, cached in (("keys", keys), ("values", values)):
        if head_dim > 1 and cached.stride(-1) != 1:
            raise ValueError(f"`{name}` must be contiguous along the last axis, got strides {cached.stride()}.")
    if (cos is None) != (sin is None):
        raise ValueError("`cos` and `sin` must both be given, or neither.")
    if cos is not None and not (cos.shape[-1] % 2 == 0 and 0 < cos.shape[-1] <= head_dim):
        raise ValueError(
            f"`cos` must have an even number of columns, at most head_dim = {head_dim}, got {cos.shape[-1]}."
        )
