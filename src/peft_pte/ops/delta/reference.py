"""The adapters' reading of the thought state in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def delta_reference(hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, scale: float) -> Tensor:
    """``[B, T, out]``; arguments as in :func:`peft_pte.ops.delta.api.delta`."""
    low_rank = functional.linear(hidden, down)
    read = torch.matmul(low_rank, state.to(low_rank.dtype).mT)
    return functional.linear(read * scale, up)
