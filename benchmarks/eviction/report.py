"""What a choice costs, by policy."""

from __future__ import annotations

from ..common.pages import Section, origin, table
from ..common.records import Record
from .measure import KEY

HEADER = ("policy", "launches to choose and copy, per layer", "to encode", "CPU ms to choose and copy", "to encode")
HEADER += ("scoring, launches", "scoring, CPU time", "cache bytes")


def render(records: list[Record]) -> str:
    """A line per policy; scoring and bytes relative to the first."""
    first, body = records[0], []
    for row in records:
        cells = [f"`{row['policy']}`", f"{row['choose_launches']:.0f}", f"{row['encode_launches']:.0f}"]
        cells += [f"{1e3 * row[name]:.2f}" for name in ("choose_seconds", "encode_seconds")]
        cells += [f"{row[name] / first[name]:.2f} x" for name in ("score_launches", "score_seconds")]
        body.append([*cells, f"{row['cache_bytes'] / first['cache_bytes']:.3f} x"])
    return f"{origin(records)}\n\n{table(HEADER, body)}"


SECTIONS = (Section("docs/eviction.md", "eviction-cost", render, key=KEY),)
