"""The update of the thought state in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def encode_reference(
    state: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    valid: Tensor | None,
    gain: float,
    attention: str,
) -> Tensor:
    """``S [B, Q, R]`` after the eviction; arguments as in :func:`peft_pte.ops.encode.api.encode`."""
    projected_keys = torch.matmul(keys, key_projection.mT)
    projected_values = torch.matmul(values, value_projection.mT)
    scores = torch.matmul(query, projected_keys.mT) / math.sqrt(query.shape[-1])
    if attention == "softmax":
        weights = _masked_softmax(scores, valid)
    else:
        weights = _masked_mean(share_out(scores) if attention == "slots" else scores, valid)
    return normalize_rows(state + gain * torch.matmul(weights, projected_values))


def share_out(scores: Tensor) -> Tensor:
    """Shares ``[.., Q, E]`` of each token among the rows, 1 on average, from scores ``[.., Q, E]``."""
    return scores.shape[-2] * scores.softmax(dim=-2)


def normalize_rows(state: Tensor) -> Tensor:
    """Rows of L2 norm 1; a zero row stays zero and passes its gradient on unscaled."""
    square = state.square().sum(dim=-1, keepdim=True)
    # Masked before the root: its slope at zero is infinite, and a row may be exactly zero.
    return state / torch.where(square > 0, square, 1.0).sqrt()


def _masked_mean(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores / scores.shape[-1]
    mask = valid[..., None, :]
    return torch.where(mask, scores, 0.0) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def _masked_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores.softmax(dim=-1)
    mask = valid[..., None, :]
    # A row without any valid token has no softmax; its weights are zero, not 0 / 0.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.where(mask, weights, 0.0)
