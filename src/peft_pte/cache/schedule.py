"""The clock of one row: what leaves before a thought is written, what it sees, where it stands. Pure; DESIGN.md, section 2.

``W`` is the window and ``m`` the tokens of an eviction. Thoughts are counted from 0, padding apart.
"""

from __future__ import annotations


def evictions_before(thought: int, window: int, step: int) -> int:
    """``e(t)``, evictions that happen before the thought ``t`` is written."""
    return 0 if thought < window else (thought - window) // step + 1


def first_visible(thought: int, window: int, step: int) -> int:
    """The oldest thought that the thought ``t`` sees; it sees all from there to itself."""
    return evictions_before(thought, window, step) * step


def slot_of(thought: int, window: int) -> int:
    """Where the thought ``t`` stands in a window of fixed slots."""
    return thought % window
