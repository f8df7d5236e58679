"""The update of the thought state in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...updates import UPDATES


def updates_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    valid: Tensor | None,
    attention: str,
) -> Tensor:
    """``S' [B N, Q, R]`` of evictions ``[B N, E, D]``; arguments as in :func:`peft_pte.ops.encode.api.encode`."""
    projected_keys = torch.matmul(keys, key_projection.mT)
    projected_values = torch.matmul(values, value_projection.mT)
    scores = torch.matmul(query / math.sqrt(query.shape[-1]), projected_keys.mT)
    return torch.matmul(UPDATES[attention].weights(scores, valid), projected_values)


class _Recurrence(torch.autograd.Function):
    """Its own backward pass, since autograd's takes three times the launches for each eviction."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, updates: Tensor, gain: float) -> Tensor:
        states, norms = [], []
        for update in updates.unbind(1):
            state, norm = _normalized(torch.add(state, update, alpha=gain))
            states.append(state)
            norms.append(norm)
        out = torch.stack(states, dim=1)
        ctx.save_for_backward(out, torch.stack(norms, dim=1))
        ctx.gain = gain
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        out, norms = ctx.saved_tensors
        carry, grads = None, []
        for after, norm, wanted in zip(*(part.unbind(1)[::-1] for part in (out, norms, grad)), strict=True):
            carry = wanted if carry is None else wanted + carry
            # A zero row was not divided by its norm, so it passes its gradient on; it is zero, and that says so.
            carry = torch.addcmul(carry, after, (carry * after).sum(dim=-1, keepdim=True), value=-1.0) / norm
            grads.append(carry)
        if carry is None:
            raise ValueError("`updates` must hold at least one eviction.")
        return carry, ctx.gain * torch.stack(grads[::-1], dim=1), None


def recur_reference(state: Tensor, updates: Tensor, gain: float) -> Tensor:
    """``S [B, N, Q, R]`` after each of the updates ``[B, N, Q, R]``: ``S <- Norm(S + gain S')``."""
    result: Tensor = _Recurrence.apply(state, updates, gain)  # type: ignore[no-untyped-call]
    return result


def _normalized(state: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of L2 norm 1, and the norms; a zero row stays zero, and its norm counts as 1."""
    norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == 0, 1.0)
    return state / norm, norm
