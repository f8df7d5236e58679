"""95 % intervals: of a binomial share (Wilson), and of a share whose answers stand or fall together by problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Z = 1.959964


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a binomial ``share`` of ``count``; ``(0, 1)`` where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(right: Tensor) -> dict[str, Any]:
    """Accuracy of independent answers (``None`` where nothing was asked), Wilson's interval, and their number ``n``."""
    count = right.numel()
    accuracy = int(right.sum()) / count if count else 0.0
    low, high = wilson(accuracy, count)
    return {"accuracy": accuracy if count else None, "low": low, "high": high, "n": count}


def clustered_share(right: Tensor, chosen: Tensor) -> dict[str, Any]:
    """As :func:`share`, of those answers ``right [B, F]`` that are ``chosen [B, F]``, whose problems ``B`` are what varies.

    The interval is that of a ratio of sums over problems, from the spread of ``hits - accuracy * asked`` between them.
    """
    asked, hits = chosen.sum(dim=1).double(), (right & chosen).sum(dim=1).double()
    count = int(asked.sum())
    if count == 0:
        return {"accuracy": None, "low": 0.0, "high": 1.0, "n": 0}
    accuracy = float(hits.sum()) / count
    spread = 1.0
    if len(right) > 1:
        squares = float((hits - accuracy * asked).square().sum())
        spread = Z * math.sqrt(squares * len(right) / (len(right) - 1)) / count
    return {"accuracy": accuracy, "low": max(accuracy - spread, 0.0), "high": min(accuracy + spread, 1.0), "n": count}


def bootstrap(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values``, one value a problem, which are resampled."""
    rows = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
    low, high = rows[picked].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
