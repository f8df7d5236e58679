"""``encode``: the thought state after each of several evictions, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...shapes import EvictedRows, EvictedValid, Projection, Query, State, checked
from ...updates import implementation_of
from ..implementation import resolve_impl


@checked
def encode(
    state: State,
    query: Query,
    keys: EvictedRows,
    values: EvictedRows,
    key_projection: Projection,
    value_projection: Projection,
    valid: EvictedValid | None = None,
    *,
    gain: float = 0.3,
    attention: str = "linear",
    impl: str = "auto",
) -> Tensor:
    """``S <- Norm(S + gain * enc(K_e, V_e))``, row-wise L2 norm, for ``N`` evictions; paper section 3, ``ops/README.md``.

    An update does not depend on the state, so those of all evictions are computed together; the recurrence alone runs one after the
    other. Computed in float64 for a float64 ``state`` and in float32 otherwise, outside any autocast.

    Args:
        state: ``S [B, Q, R]`` before the first eviction (zeros for ``S0``).
        query: ``W_Q h_g [Q, R]``, the same for every sequence.
        keys: ``K_e [B, N, E, D]``, evicted keys, heads flattened.
        values: ``V_e [B, N, E, D]``, evicted values, heads flattened.
        key_projection: ``W_K [R, D]``.
        value_projection: ``W_V [R, D]``.
        valid: ``[B, N, E]``, False for padding, which contributes exactly zero. ``None``: all valid.
        gain: Factor on the update.
        attention: ``"linear"``: the mean over the valid evicted tokens of ``(q . k / sqrt(R)) v``; ``"softmax"``: the
            softmax-weighted sum; ``"slots"``: the mean with ``Q softmax_Q(q . k / sqrt(R))`` for the score, so that a token
            is shared out among the rows; or one that was registered (:func:`peft_pte.register_update`).
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``S [B, N, Q, R]`` after each eviction; rows that are exactly zero stay zero.

    Raises:
        ValueError: ``attention`` or ``impl`` is none of the above.
        NotImplementedError: ``impl`` cannot run on the device of ``state``, or does not know the update.
    """
    impl = implementation_of(attention, impl)
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    state, query, keys, values, key_projection, value_projection = (
        operand.to(dtype) for operand in (state, query, keys, values, key_projection, value_projection)
    )
    updates: Callable[..., Tensor]
    recur: Callable[..., Tensor]
    if resolve_impl(impl, state.device, "encode", dtype, state.shape[0]) == "triton":
        from .triton import recur_triton as recur
        from .triton import updates_triton as updates
    else:
        from .reference import recur_reference as recur
        from .reference import updates_reference as updates
    rows, evictions = keys.shape[:2]
    mask = None if valid is None else valid.flatten(end_dim=1)
    with torch.autocast(state.device.type, enabled=False):
        new = updates(
            query, keys.flatten(end_dim=1), values.flatten(end_dim=1), key_projection, value_projection, mask, attention
        )
        return recur(state, new.unflatten(0, (rows, evictions)), gain)
