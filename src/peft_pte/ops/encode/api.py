"""``encode``: one update of the thought state, whoever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...shapes import EvictedRows, EvictedValid, Projection, Query, State, checked
from ..implementation import resolve_impl

ATTENTIONS = ("linear", "softmax", "slots")


def check_attention(attention: str) -> None:
    """Refuse what no implementation computes.

    Raises:
        ValueError: ``attention`` is none of ``ATTENTIONS``.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"`attention` must be one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}.")


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
    """``S <- Norm(S + gain * enc(K_e, V_e))``, row-wise L2 norm; paper section 3, ``ops/README.md``.

    Computed in float64 for a float64 ``state`` and in float32 otherwise, outside any autocast.

    Args:
        state: ``S [B, Q, R]`` before the eviction (zeros for ``S0``).
        query: ``W_Q h_g [Q, R]``, the same for every sequence.
        keys: ``K_e [B, E, D]``, evicted keys, heads flattened.
        values: ``V_e [B, E, D]``, evicted values, heads flattened.
        key_projection: ``W_K [R, D]``.
        value_projection: ``W_V [R, D]``.
        valid: ``[B, E]``, False for padding, which contributes exactly zero. ``None``: all valid.
        gain: Factor on the update.
        attention: ``"linear"``: the mean over the valid evicted tokens of ``(q . k / sqrt(R)) v``; ``"softmax"``: the
            softmax-weighted sum; ``"slots"``: the mean with ``Q softmax_Q(q . k / sqrt(R))`` for the score, so that a token
            is shared out among the rows.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``S [B, Q, R]`` after the eviction; rows that are exactly zero stay zero.

    Raises:
        ValueError: ``attention`` or ``impl`` is none of the above.
        NotImplementedError: ``impl`` cannot run on the device of ``state``.
    """
    check_attention(attention)
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    state, query, keys, values, key_projection, value_projection = (
        operand.to(dtype) for operand in (state, query, keys, values, key_projection, value_projection)
    )
    if resolve_impl(impl, state.device) == "triton":
        from .triton import encode_triton as compute
    else:
        from .reference import encode_reference as compute
    with torch.autocast(state.device.type, enabled=False):
        return compute(state, query, keys, values, key_projection, value_projection, valid, gain, attention)
