"""``delta``, and ``delta_read`` with ``delta_add_``: what adapters add to their linears, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...shapes import Down, GroupDown, Hidden, OneToken, Output, Rows, State, Up, checked
from ..implementation import resolve_impl


@checked
def delta(
    hidden: Hidden,
    down: Down,
    state: State,
    up: Up,
    *,
    scale: float = 1.0,
    onto: Output | None = None,
    impl: str = "auto",
) -> Tensor:
    """``onto + scale * A (S (B x))`` with one ``S`` per sequence: the dynamic weight ``dW = A S B`` (paper section 3).

    Args:
        hidden: ``x [B, T, in]``; cast to the dtype of ``down``. What is kept for the backward pass is ``hidden`` as it came.
        down: The paper's ``B``, ``[R, in]``.
        state: ``S [B, Q, R]``.
        up: The paper's ``A``, ``[out, Q]``.
        scale: ``alpha / R``, or ``alpha / sqrt(R)``.
        onto: ``[B, T, out]``, what the linear gave: added to as part of the last product, and left as it is. It may
            have another dtype than the adapter; the last product is then taken in its dtype.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``[B, T, out]`` in the dtype of ``onto``; without it, in the dtype that a product with ``down`` has.

    Raises:
        ValueError: ``impl`` is none of the above.
        NotImplementedError: ``impl`` cannot run on the device of ``hidden``.
    """
    if resolve_impl(impl, hidden.device, "delta", down.dtype, hidden.shape[0]) == "triton":
        from .triton import delta_triton as compute
    else:
        from .reference import delta_reference as compute
    return compute(hidden, down, state, up, onto, scale)


@checked
def delta_read(hidden: OneToken, down: GroupDown, state: State, *, impl: str = "auto") -> tuple[Tensor, ...]:
    """``S (B_i x)`` of the linears that read the same ``x`` (q, k, v; gate, up), each for a :func:`delta_add_` of its own.

    Made for decoding: no gradients, one token per sequence.

    Args:
        hidden: ``x [B, 1, in]``; cast to the dtype of ``down``.
        down: All ``B_i`` one above the other, ``[n R, in]``.
        state: ``S [B, Q, R]``.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``n`` tensors that the same implementation of :func:`delta_add_` takes: ``[B, Q]``, or ``[splits, B, Q]`` with their sum to come.

    Raises:
        ValueError: ``impl`` is none of the above, or the rows of ``down`` are no multiple of ``R``.
        NotImplementedError: ``impl`` cannot run on the device of ``hidden``.
    """
    if down.shape[0] % state.shape[2]:
        raise ValueError(
            f"`down` must have a multiple of {state.shape[2]} rows, the columns of `state`, got {down.shape[0]}."
        )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return for_tokens(impl, hidden.device, down.dtype, hidden.shape[0]).read(hidden, down, state)


@checked
def delta_add_(base: Rows, read: Tensor, up: Up, *, scale: float = 1.0, impl: str = "auto") -> None:
    """``base += scale * A z`` in place, for a ``z`` of :func:`delta_read`.

    Args:
        base: ``[B, out]``, what the linear gave; contiguous along the last axis.
        read: Of the same implementation.
        up: ``A [out, Q]``.
        scale: ``alpha / R``, or ``alpha / sqrt(R)``.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: ``impl`` is none of the above, or ``base`` cannot be written row by row.
        NotImplementedError: ``impl`` cannot run on the device of ``base``.
    """
    if base.shape[1] > 1 and base.stride(1) != 1:
        raise ValueError(
            f"`base` must be contiguous along the last axis, got strides {base.stride()}. Make it contiguous."
        )
    with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
        operations = for_tokens(impl, base.device, up.dtype, base.shape[0])
        if not operations.mixes:
            read, up = read.to(base.dtype), up.to(base.dtype)
        operations.add_(base, read, up.mT, alpha=scale)


class TokenOps(NamedTuple):
    """:func:`delta_read` and :func:`delta_add_` of one implementation, for who has checked what they are given."""

    read: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    add_: Callable[..., Any]
    """Takes ``up`` as ``A^T [Q, out]`` and ``scale`` as ``alpha``."""
    mixes: bool
    """Whether ``add_`` takes a ``base`` of another dtype than the rest."""


def for_tokens(impl: str, device: torch.device, dtype: torch.dtype, rows: int) -> TokenOps:
    """The operations of one token per row, for who calls them often.

    Args:
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.
        device: Where they run.
        dtype: Of the weights.
        rows: ``B``.

    Returns:
        :func:`delta_read` and :func:`delta_add_` of one implementation, which check nothing.

    Raises:
        ValueError: ``impl`` is no implementation.
        NotImplementedError: It cannot run there.
    """
    if resolve_impl(impl, device, "delta_token", dtype, rows) == "triton":
        from .triton import add_triton_, read_triton

        return TokenOps(read_triton, add_triton_, mixes=True)
    from .reference import add_reference_, read_reference

    return TokenOps(read_reference, add_reference_, mixes=False)
