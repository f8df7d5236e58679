"""The adapters' reading of the thought state in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def delta_reference(
    hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, onto: Tensor | None, scale: float
) -> Tensor:
    """``[B, T, out]``; arguments as in :func:`peft_pte.ops.delta.api.delta`."""
    low_rank = _low_rank(hidden, down)
    read = torch.matmul(low_rank, state.to(low_rank.dtype).mT)
    if onto is None:
        return functional.linear(read * scale, up)
    rows = (onto.flatten(end_dim=1), read.flatten(end_dim=1).to(onto.dtype), up.mT.to(onto.dtype))
    if torch.is_autocast_enabled(onto.device.type):
        # Autocast would round what the linear gave, if that was not in its dtype.
        with torch.autocast(onto.device.type, enabled=False):
            return torch.addmm(*rows, alpha=scale).view(onto.shape)
    return torch.addmm(*rows, alpha=scale).view(onto.shape)


def _low_rank(hidden: Tensor, down: Tensor) -> Tensor:
    """``x B^T`` in the dtype of ``B``."""
    if hidden.dtype == down.dtype or not torch.is_grad_enabled():
        return functional.linear(hidden.to(down.dtype), down)
    device, dtype = hidden.device.type, down.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # Autocast would keep the cast of `down` that the function makes, which has no history, for other uses of `down`.
    with torch.autocast(device, enabled=False):
        low_rank: Tensor = CastProduct.apply(hidden, down, dtype)  # type: ignore[no-untyped-call]
    return low_rank


class CastProduct(torch.autograd.Function):
    """``x B^T``, taken in a dtype that need not be that of either.

    Autograd would keep the cast ``x`` for the gradient of ``B``: one copy for each linear that reads it, and with adapters in
    float32 twice as wide as ``x``. Kept is ``x`` as it came, which the linears share, and it is cast again.
    """

    @staticmethod
    def forward(hidden: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return functional.linear(hidden.to(dtype), down.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:  # noqa: D102
        hidden, down, ctx.dtype = inputs
        ctx.save_for_backward(hidden, down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]  # noqa: D102
        hidden, down = ctx.saved_tensors
        grad_hidden = grad_down = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.matmul(grad, down.to(ctx.dtype)).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                cast = hidden.to(ctx.dtype)
                grad_down = (grad.flatten(end_dim=-2).mT @ cast.flatten(end_dim=-2)).to(down.dtype)
        return grad_hidden, grad_down, None


def read_reference(hidden: Tensor, down: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """``[B, Q]`` of each linear; arguments as in :func:`peft_pte.ops.delta.api.delta_read`."""
    dtype = down.dtype
    low = functional.linear(hidden if hidden.dtype == dtype else hidden.to(dtype), down)
    state = state if state.dtype == dtype else state.to(dtype)
    low = low.view(state.shape[0], -1, state.shape[2])
    # The state as it lies: by value the sums then come in the order that they have for one linear alone.
    return torch.bmm(state, low.mT).unbind(2) if state.stride(2) == 1 else torch.bmm(low, state.mT).unbind(1)


# ``base [B, out] += alpha * z A^T``, for ``z [B, Q]`` and ``A^T [Q, out]`` in the dtype of ``base``. No function of ours: it is called for
# every linear and token.
add_reference_ = Tensor.addmm_
