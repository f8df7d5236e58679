"""Mean absolute log-ratio of a token by where it stands, and the spread of a sequence's sum."""

from __future__ import annotations

from ..common.pages import Section, grouped, origin, table
from ..common.records import Record
from .measure import KEY, WINDOW


def render(records: list[Record]) -> str:
    """A line per arm and dtype."""
    body = []
    for (arm, dtype), part in grouped(records, lambda row: (row["arm"], row["dtype"])).items():
        worst = [max(row[name] for row in part) for name in ("p99_abs", "max_abs")]
        cells = [f"{row['mean_abs']:.4f}" for row in part]
        body.append([arm, dtype, *cells, *(f"{value:.3f}" for value in worst), f"{part[-1]['sequence_std']:.3f}"])
    ends = dict.fromkeys((row["from"], row["to"]) for row in records)
    head = ["arm", "base", *(f"mean abs, tokens {low}-{high}" for low, high in ends)]
    head += ["99th percentile, worst part", "largest", "spread of a sequence's sum"]
    first, last = records[0], records[-1]
    texts = first["tokens"] // (first["to"] - first["from"])
    return f"{texts} texts of {last['to']} tokens, window {WINDOW}. {origin(records)}\n\n{table(head, body, left=2)}"


SECTIONS = (Section("docs/evidence.md", "half", render, key=KEY),)
