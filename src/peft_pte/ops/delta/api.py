"""``delta``: what an adapter adds to its linear, whoever computes it."""

from __future__ import annotations

from torch import Tensor

from ...shapes import Down, Hidden, State, Up, checked
from ..implementation import resolve_impl


@checked
def delta(hidden: Hidden, down: Down, state: State, up: Up, *, scale: float = 1.0, impl: str = "auto") -> Tensor:
    """``scale * A (S (B x))`` with one ``S`` per sequence: the dynamic weight ``dW = A S B`` (paper section 3).

    Args:
        hidden: ``x [B, T, in]``.
        down: The paper's ``B``, ``[R, in]``.
        state: ``S [B, Q, R]``.
        up: The paper's ``A``, ``[out, Q]``.
        scale: ``alpha / R``, or ``alpha / sqrt(R)``.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``[B, T, out]`` in the dtype that ``hidden @ down.T`` has.

    Raises:
        ValueError: ``impl`` is none of the above.
        NotImplementedError: ``impl`` cannot run on the device of ``hidden``.
    """
    if resolve_impl(impl, hidden.device) == "triton":
        from .triton import delta_triton as compute
    else:
        from .reference import delta_reference as compute
    return compute(hidden, down, state, up, scale)
