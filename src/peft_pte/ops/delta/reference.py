"""The adapters' reading of the thought state in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def delta_reference(
    hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, onto: Tensor | None, scale: float
) -> Tensor:
    """``[B, T, out]``; arguments as in :func:`peft_pte.ops.delta.api.delta`."""
    low_rank = functional.linear(hidden, down)
    read = torch.matmul(low_rank, state.to(low_rank.dtype).mT)
    if onto is None:
        return functional.linear(read * scale, up)
    rows = (onto.flatten(end_dim=1), read.flatten(end_dim=1).to(onto.dtype), up.mT.to(onto.dtype))
    if torch.is_autocast_enabled(onto.device.type):
        # Autocast would round what the linear gave, if that was not in its dtype.
        with torch.autocast(onto.device.type, enabled=False):
            return torch.addmm(*rows, alpha=scale).view(onto.shape)
    return torch.addmm(*rows, alpha=scale).view(onto.shape)


def delta_group_reference(
    bases: list[Tensor],
    hidden: Tensor,
    down: Tensor,
    state: Tensor,
    ups: list[Tensor],
    scales: list[float],
    ranks: list[int],
) -> None:
    """Adds to ``bases [B * T, out_i]``; arguments as in :func:`peft_pte.ops.delta.api.delta_group_`."""
    low_rank = functional.linear(hidden.to(down.dtype), down)
    state = state.to(down.dtype).mT
    parts = low_rank.split(ranks, dim=-1)
    for base, part, up, scale, rank in zip(bases, parts, ups, scales, ranks, strict=True):
        read = torch.matmul(part, state[:, :rank])
        base.addmm_(read.flatten(end_dim=1).to(base.dtype), up.mT.to(base.dtype), alpha=scale)
