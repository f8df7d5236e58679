"""Which thoughts leave the window: a policy is a small dataclass that scores them by their keys.

The budget is counted in tokens: at an eviction the ``m`` thoughts with the lowest score leave, per KV head unless the
policy is ``uniform``, in which case the same slots leave in every head and layer and no score is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..shapes import HeadScores, HeadStates, checked


@dataclass(frozen=True)
class EvictionPolicy:
    """Base of the policies; a subclass gives ``score`` or says ``uniform``."""

    uniform: ClassVar[bool] = False

    def score(self, keys: HeadStates) -> HeadScores:
        """Importance ``[B, G, N]`` of the thoughts whose keys are ``[B, G, N, head_dim]``, oldest first; higher stays."""
        raise NotImplementedError(
            f"{type(self).__name__} is uniform: it evicts the oldest thoughts and scores nothing."
        )

    @torch.no_grad()
    def select(self, keys: HeadStates, evict: int) -> tuple[Tensor, Tensor]:
        """Indices ``(evicted [B, G, evict], kept [B, G, N - evict])``, each from the oldest to the newest."""
        # A stable sort, so that equal scores evict the older thought on every device.
        order = self.score(keys).argsort(dim=-1, stable=True)
        return order[..., :evict].sort(dim=-1).values, order[..., evict:].sort(dim=-1).values


@dataclass(frozen=True)
class SlidingWindow(EvictionPolicy):
    """The oldest thoughts leave (the paper's default)."""

    uniform: ClassVar[bool] = True


@dataclass(frozen=True)
class KeyDiff(EvictionPolicy):
    """The thoughts whose keys are most like the average key leave, per head (KeyDiff, arXiv 2504.15364)."""

    @checked
    def score(self, keys: HeadStates) -> HeadScores:
        """Minus the cosine similarity of each key with the mean of the unit keys of its head."""
        unit = functional.normalize(keys.float() if keys.dtype != torch.float64 else keys, dim=-1)
        return -functional.cosine_similarity(unit, unit.mean(dim=-2, keepdim=True), dim=-1)


POLICIES: dict[str, type[EvictionPolicy]] = {"sliding_window": SlidingWindow, "key_diff": KeyDiff}


def make_policy(name: str) -> EvictionPolicy:
    """The policy that ``PTEConfig.eviction`` names."""
    return POLICIES[name]()
