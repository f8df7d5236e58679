"""The window of a layer, split over its heads: how many thoughts each holds after how many evictions. Pure.

All heads lose thoughts at the same time, and each gets every new thought, so what a head may hold beyond ``W`` it gets by losing fewer
than ``m`` at its first evictions. Before the first all hold ``W``: nothing is lost that a full window would not lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


def split(importance: Sequence[float], window: int, least: int, equal: float) -> tuple[int, ...]:
    """Thoughts per head, ``window`` on average.

    Args:
        importance: By head.
        window: ``W``.
        least: What each head gets at least.
        equal: Share of the rest that is split alike.
    """
    heads = len(importance)
    shared = heads * (window - least)
    total = sum(importance) or 1.0
    weights = [
        equal / heads + (1 - equal) * (number / total if sum(importance) else 1 / heads) for number in importance
    ]
    wanted = [shared * weight for weight in weights]
    budgets = [int(number) for number in wanted]
    # Largest remainders first; of equal ones the first head.
    order = sorted(range(heads), key=lambda head: budgets[head] - wanted[head])
    for head in order[: shared - sum(budgets)]:
        budgets[head] += 1
    return tuple(least + budget for budget in budgets)


@dataclass(frozen=True)
class HeadClock:
    """How many thoughts the heads of a layer hold and lose.

    Args:
        budgets: Thoughts that each head holds at most.
        window: ``W``.
        step: ``m``, thoughts that are written between two evictions.
    """

    budgets: tuple[int, ...]
    window: int
    step: int

    @cached_property
    def table(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """By eviction, from the first on: what each head loses, and what it holds then; all that follow are as the last."""
        held, rows = [self.window] * len(self.budgets), []
        while True:
            lost = [max(0, size - budget + self.step) for size, budget in zip(held, self.budgets, strict=True)]
            after = [size - gone for size, gone in zip(held, lost, strict=True)]
            rows.append((tuple(lost), tuple(after)))
            if all(gone == self.step for gone in lost) and len(rows) > 1:
                return tuple(rows)
            held = [size + self.step for size in after]

    @property
    def most_lost(self) -> int:
        """Thoughts that a head loses at one eviction, at most."""
        return max(max(lost) for lost, _ in self.table)

    @property
    def most_held(self) -> int:
        """Thoughts that a head holds, at most."""
        return max(self.window, *self.budgets)
