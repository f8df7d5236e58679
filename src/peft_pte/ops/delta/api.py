"""``delta`` and ``delta_group_``: what adapters add to their linears, whoever computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...shapes import Down, GroupDown, GroupOutput, GroupUp, Hidden, Output, State, Up, checked
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
    if resolve_impl(impl, hidden.device) == "triton":
        from .triton import delta_triton as compute
    else:
        from .reference import delta_reference as compute
    return compute(hidden, down, state, up, onto, scale)


@checked
def delta_group_(
    bases: Sequence[GroupOutput],
    hidden: Hidden,
    down: GroupDown,
    state: State,
    ups: Sequence[GroupUp],
    scales: Sequence[float],
    *,
    ranks: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """``base_i += scale_i * A_i (S (B_i x))`` in place for linears that read the same ``x`` (q, k, v; gate, up).

    Made for decoding: no gradients, few tokens per sequence. An adapter of a smaller rank than the state reads the
    state's first columns.

    Args:
        bases: ``[B, T, out_i]``, what each linear gave; overwritten. Rows must be one stride apart.
        hidden: ``x [B, T, in]``; cast to the dtype of ``down``.
        down: All ``B_i`` one above the other, ``[sum of R_i, in]``.
        state: ``S [B, Q, R]``.
        ups: ``A_i [out_i, Q]``.
        scales: One factor per linear.
        ranks: ``R_i``. ``None``: equal shares of the rows of ``down``.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: The lists differ in length, the ranks do not add up, or a base cannot be written row by row.
        NotImplementedError: ``impl`` cannot run on the device of ``hidden``.
    """
    ranks = [down.shape[0] // max(1, len(ups))] * len(ups) if ranks is None else list(ranks)
    if not len(bases) == len(ups) == len(scales) == len(ranks) > 0:
        raise ValueError(
            "`bases`, `ups`, `scales` and `ranks` must have one entry per linear, got "
            f"{len(bases)}, {len(ups)}, {len(scales)} and {len(ranks)}."
        )
    if sum(ranks) != down.shape[0] or not all(0 < rank <= state.shape[-1] for rank in ranks):
        raise ValueError(
            f"`ranks` must add up to the {down.shape[0]} rows of `down` and be at most {state.shape[-1]} each, got {ranks}."
        )
    rows = [_rows_of(base) for base in bases]
    if resolve_impl(impl, hidden.device) == "triton":
        from .triton import delta_group_triton as compute
    else:
        from .reference import delta_group_reference as compute
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        compute(rows, hidden, down, state, list(ups), list(scales), ranks)


def _rows_of(base: Tensor) -> Tensor:
    """``[B, T, out]`` as ``[B * T, out]``, a view."""
    batch, tokens, outer = base.shape
    one_stride = tokens == 1 or batch == 1 or base.stride(0) == tokens * base.stride(1)
    if not one_stride or (outer > 1 and base.stride(2) != 1):
        raise ValueError(
            f"`bases` must be contiguous along the last axis and have their rows one stride apart, got strides "
            f"{base.stride()} for shape {tuple(base.shape)}. Make it contiguous."
        )
    return base.view(batch * tokens, outer)
