"""The clock of one row: what leaves before a thought is written, what it sees, where it stands. Pure; DESIGN.md, section 2.

``W`` is the window and ``m`` the tokens of an eviction. Thoughts are counted from 0, padding apart. A thought is a number, or a
tensor with one for each row.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def evictions_before(thought: int, window: int, step: int) -> int: ...
@overload
def evictions_before(thought: Tensor, window: int, step: int) -> Tensor: ...
def evictions_before(thought: int | Tensor, window: int, step: int) -> int | Tensor:
    """``e(t)``, evictions that happen before the thought ``t`` is written."""
    evictions = (thought - window) // step + 1
    return evictions.clamp(min=0) if isinstance(evictions, Tensor) else max(0, evictions)


@overload
def first_visible(thought: int, window: int, step: int) -> int: ...
@overload
def first_visible(thought: Tensor, window: int, step: int) -> Tensor: ...
def first_visible(thought: int | Tensor, window: int, step: int) -> int | Tensor:
    """The oldest thought that the thought ``t`` sees; it sees all from there to itself."""
    return evictions_before(thought, window, step) * step


def is_due(thought: int, window: int, step: int) -> bool:
    """Whether an eviction comes before the thought ``t``."""
    return thought >= window and (thought - window) % step == 0


def until_due(thought: int, window: int, step: int) -> int:
    """Thoughts, ``thought`` the first of them, that are written before the next eviction that comes behind it."""
    return (evictions_before(thought, window, step) * step + window) - thought


def held_after(thoughts: int, window: int, step: int) -> int:
    """Thoughts in the window after ``thoughts`` were written."""
    return thoughts - first_visible(thoughts - 1, window, step) if thoughts else 0


def slot_of(thought: int, window: int) -> int:
    """Where the thought ``t`` stands in a window of fixed slots."""
    return thought % window


def newest_in(slots: Tensor, thought: Tensor, window: int) -> Tensor:
    """``[B, W]``, the newest thought up to ``thought [B]`` that stands in each of ``slots [W]``; negative where there was none."""
    return thought[:, None] - (thought[:, None] - slots) % window
