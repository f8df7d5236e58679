"""The table of operations."""

from __future__ import annotations

from ..common.pages import Section, origin, table
from ..common.records import Record
from .measure import KEY, PARTS

METHODS = {
    "lora": "LoRA, full cache",
    "lora_bounded": "LoRA under the window",
    "pte": "PTE",
    "pte_whole_segments": "PTE, `recompute_layers=False`",
    "pte_offload": "PTE, `offload=True`",
}


def render(records: list[Record], brief: bool = False) -> str:
    """A line per shape and method; ``brief``: without the parts of a step."""
    first = records[0]
    full = {row["shape"]: row for row in records if row["peer"] == "lora"}
    body = []
    for row in records:
        cells = [] if brief else [f"{row['parts'][part]['visible'] / 1e12:.1f}" for part in PARTS]
        totals = ("visible_total", "dense_total")
        cells += [f"{row[name] / 1e12:.1f}" for name in totals]
        cells += [f"{row[name] / full[row['shape']][name]:.3f}" for name in totals]
        body.append([row["shape"], METHODS[row["peer"]], *cells])
    header = ["shape", "method", *([] if brief else (part.replace("_", " ") for part in PARTS))]
    header += ["all, visible pairs", "all, dense", "of LoRA, visible", "of LoRA, dense"]
    return (
        "**Operations of one GRPO step per sequence, TFLOP (counted, not timed).** Prompt "
        f"{first['prompt']}, completion {first['completion']:,}, window {first['window']:,}, {first['window'] // 4} leave "
        f"together, rank {first['rank']}, layers or segments recomputed; rollout, forward of the old policy, scoring forward, "
        "backward with recomputation. `dense` counts attention over all pairs of a call, `visible` those that the causal mask "
        "lets through. The paper reports 7.4 TFLOPs for LoRA and 4.6 for its method, a ratio of 0.62, and does not say per "
        f"what. {origin(records)}\n\n" + table(header, body, left=2)
    )


SECTIONS = (Section("benchmarks/operations/README.md", "operations", render, key=KEY),)
