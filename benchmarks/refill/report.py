"""Steps and time of rows that wait and of rows that are refilled."""

from __future__ import annotations

from ..common.pages import Section, grouped, origin, table
from ..common.records import Record
from .measure import KEY


def render(records: list[Record]) -> str:
    """A line per case."""
    body = []
    for (spread, per_row), rows in grouped(records, lambda row: (row["spread"], row["per_row"])).items():
        arms = {row["arm"]: row for row in rows}
        lora, waits, refills = (arms[name] for name in ("lora generate", "pte generate", "pte generate_batch"))
        steps, seconds = (1 - refills[name] / waits[name] for name in ("steps", "cpu_seconds"))
        cells = [f"{spread}", f"{per_row}", f"{waits['steps']}", f"{refills['steps']}", f"{steps:.0%}"]
        cells += [f"{arm['cpu_seconds']:.1f}" for arm in (lora, waits, refills)]
        body.append([*cells, f"{seconds:.0%}", f"{seconds / steps:.0%}"])
    header = [
        "spread",
        "requests per row",
        "steps, `generate`",
        "`generate_batch`",
        "saved",
        "CPU s, LoRA",
        "PTE `generate`",
    ]
    header += ["PTE `generate_batch`", "saved", "of the steps' saving"]
    return f"{origin(records)}\n\n{table(header, body, left=0)}"


def rows(records: list[Record]) -> str:
    """Refilled rows beside rows that wait."""
    return render([record for record in records if "processes" not in record])


def processes(records: list[Record]) -> str:
    """One process beside two, and beside as many threads."""
    records = [record for record in records if "processes" in record]
    body = []
    for spread, found in grouped(records, lambda row: row["spread"]).items():
        alone = found[0]["wall_seconds"]
        body += [
            [
                f"{spread}",
                f"{row['processes']}",
                f"{row['threads']}",
                f"{row['wall_seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['tokens'] / row['wall_seconds']:.0f}",
                f"{alone / row['wall_seconds']:.2f}",
                f"{row['idle']:.0%}",
            ]
            for row in found
        ]
    header = [
        "spread",
        "processes",
        "threads of each",
        "seconds",
        "CPU seconds",
        "tokens a second",
        "times one",
        "waited for the slowest",
    ]
    return f"{origin(records)}\n\n{table(header, body, left=0)}"


SECTIONS = (
    Section("benchmarks/refill/README.md", "refill", rows, key=KEY),
    Section("benchmarks/refill/README.md", "processes", processes, key=KEY),
)
