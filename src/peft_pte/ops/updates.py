"""How the tokens of an eviction share the rows of the state: one entry per update, by the name of ``PTEConfig.encoder_attention``.

An update is ``S' = weights @ (W_V V_e)`` with weights made of the scores ``(W_Q h_g) (W_K K_e)^T / sqrt(R)``. To add one, add an entry; the
kernels know the three kinds that are here, and refuse others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """One way to make an update of what was evicted."""

    weights: Callable[[Tensor, Tensor | None], Tensor]
    """From scores ``[.., Q, E]`` and the validity of tokens ``[.., E]`` (``None``: all valid) to weights ``[.., Q, E]``."""
    source: str
    """Where it comes from."""


def _mean(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores / scores.shape[-1]
    mask = valid[..., None, :]
    return torch.where(mask, scores, 0.0) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores.softmax(dim=-1)
    mask = valid[..., None, :]
    # A row without any valid token has no softmax; its weights are zero, not 0 / 0.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.where(mask, weights, 0.0)


def _shares(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Each token is shared out among the rows, 1 on average."""
    return _mean(scores.shape[-2] * scores.softmax(dim=-2), valid)


UPDATES = {
    "linear": Update(_mean, "paper, section 3: S' = (W_Q h_g) (W_K K_e)^T (W_V V_e); the mean over E is [ours]"),
    "softmax": Update(_softmax, "the same with a softmax over the evicted tokens [ours]"),
    "slots": Update(_shares, "a softmax over the rows, as in slot attention (arXiv 2006.15055) [ours]"),
}


def update_of(name: str) -> Update:
    """The update that ``PTEConfig.encoder_attention`` names.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in UPDATES:
        raise ValueError(f"`attention` must be one of {', '.join(map(repr, UPDATES))}, got {name!r}.")
    return UPDATES[name]
