"""The policies that come with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..shapes import HeadScores, checked
from .budgets import split
from .policy import EvictionPolicy, Window, register_eviction


@register_eviction("sliding_window")
@dataclass(frozen=True)
class SlidingWindow(EvictionPolicy):
    """The oldest thoughts leave (the paper's default)."""

    uniform: ClassVar[bool] = True
    exact: ClassVar[bool] = True


@register_eviction("random")
@dataclass(frozen=True)
class Random(EvictionPolicy):
    """Thoughts leave at random, per head: with the prompt kept, as good as the best scores (arXiv 2609.03430), so what a score is to beat.

    Drawn anew at every eviction from the positions of a row, the head and the layer: from nothing that could be different when the row is
    scored.
    """

    exact: ClassVar[bool] = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require_int("seed", self.seed, 0)

    @checked
    def score(self, window: Window) -> HeadScores:
        """Uniform in ``[0, 1)``."""
        positions = window.positions
        head = torch.arange(positions.shape[1], device=positions.device)[:, None]
        # The newest thought tells one eviction of a row from another.
        step = positions.amax(dim=-1, keepdim=True)
        mixed = _mix(_mix(_mix(head + 1009 * window.layer + self.seed * 1_000_003) + step) + positions)
        return (mixed & 0xFFFFFF).float() / 0x1000000


@register_eviction("key_diff")
@dataclass(frozen=True)
class KeyDiff(EvictionPolicy):
    """The thoughts whose keys are most like the average key leave, per head (KeyDiff, arXiv 2504.15364)."""

    @checked
    def score(self, window: Window) -> HeadScores:
        """Minus the cosine similarity of each key with the mean of the unit keys of its head."""
        keys = window.keys
        unit = functional.normalize(keys.float() if keys.dtype != torch.float64 else keys, dim=-1)
        return -functional.cosine_similarity(unit, unit.mean(dim=-2, keepdim=True), dim=-1)


@register_eviction("attention")
@dataclass(frozen=True)
class Attention(EvictionPolicy):
    """The thoughts that the last queries attend to least leave, per head (SnapKV, arXiv 2404.14469; with one query TOVA, arXiv 2401.06104).

    Args:
        queries: Of how many thoughts, the last before the eviction.
    """

    queries: int = 8

    def __post_init__(self) -> None:
        _require_int("queries", self.queries, 1)

    @property
    def observed(self) -> int:
        """The same."""
        return self.queries

    @checked
    def score(self, window: Window) -> HeadScores:
        """Mean attention of the queries that see a thought, and of the query heads that share its key."""
        weights = window.attention()
        heads = weights.unflatten(1, (window.keys.shape[1], -1)).mean(dim=2)
        return heads.sum(dim=2) / _queries_that_see(window).clamp(min=1)


@register_eviction("head_budget")
@dataclass(frozen=True)
class HeadBudget(Attention):
    """As ``attention``, and heads that look back further hold more: the window of a layer is split by importance (HeadKV, arXiv 2410.19258).

    A layer holds as much as with any other policy, ``G W`` thoughts. A head that gets more than ``W`` loses fewer at its first evictions,
    a head that gets less loses more; from then on all lose ``m``.

    Args:
        queries: As in ``attention``.
        importance: By layer of the model, by KV head: what :func:`peft_pte.head_importance` measures.
        equal: Share of what remains of a window behind the ``m`` thoughts that come next which all heads get alike.
    """

    importance: list[list[float]] | None = None
    equal: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance is None:
            raise ValueError(
                "`eviction_options` must hold 'importance' for 'head_budget', a number for each KV head of each layer. Measure it on the base "
                "model: peft_pte.head_importance(model, input_ids)."
            )
        numbers = [number for layer in self.importance for number in layer]
        fine = all(isinstance(number, (int, float)) and number >= 0 for number in numbers)
        if not fine or not all(math.isfinite(sum(layer)) for layer in self.importance):
            raise ValueError(
                f"`importance` must be made of numbers of at least 0 whose sums are finite, got {self.importance}. Measure it: "
                "peft_pte.head_importance(model, input_ids)."
            )
        if not 0.0 <= self.equal <= 1.0:
            raise ValueError(f"`equal` must be from 0 to 1, got {self.equal}. Use 0.5.")

    def budgets(self, layer: int, window: int, evict: int) -> tuple[int, ...] | None:
        """The window of the layer, split.

        Raises:
            ValueError: Nothing is known of the layer.
        """
        importance = self.importance or []
        if layer >= len(importance) or not importance[layer]:
            raise ValueError(
                f"`importance` must hold numbers for each layer, and has none for layer {layer}. Measure it on this model: "
                "peft_pte.head_importance(model, input_ids)."
            )
        return split(importance[layer], window, max(evict, self.queries), self.equal)

    def check(self, window: int, evict: int) -> None:
        """Refuse a window of which nothing is left to be split.

        Raises:
            ValueError: It is not longer than what every head gets.
        """
        least = max(evict, self.queries)
        if window <= least:
            raise ValueError(
                f"`cache_window` must be above {least} for HeadBudget, got {window}: each head gets the {evict} thoughts that come next, and at least the "
                f"{self.queries} whose queries are looked at, so nothing is left to be split. Use a larger window, a smaller evict_ratio, or fewer "
                "queries (eviction_options)."
            )


def _queries_that_see(window: Window) -> Tensor:
    """``[B, G, N]``, how many of the queries see each thought."""
    positions = window.query_positions
    if positions is None:
        return torch.ones_like(window.positions)
    return (window.positions[:, :, None] <= positions[:, None, :, None]).sum(dim=2)


def _mix(number: Tensor) -> Tensor:
    """One integer for another, without a pattern (the finalizer of MurmurHash3)."""
    for factor in (-49064778989728563, -4265267296055464877):
        number = (number ^ ((number >> 33) & 0x7FFFFFFF)) * factor
    return number ^ ((number >> 33) & 0x7FFFFFFF)


def _require_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` of `eviction_options` must be an integer of at least {least}, got {value!r}.")
