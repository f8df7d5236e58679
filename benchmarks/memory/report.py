"""Tables and the figure from `results/*.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from ..machine import load_runs
from ..small import same_base
from .run import EVICTIONS
from .task import CHANCE

COLUMNS = {
    "window": "in the window",
    "evicted_to_1.5": "evicted, to 1.5 W",
    "1.5_to_2.5": "1.5 to 2.5 W",
    "over_2.5": "over 2.5 W",
    "beyond_relay": "beyond relay",
}
EVICTION_ARMS = {"lora": "LoRA_c", "pte-slots": "PTE, slots"}
ARM_NAMES = {
    "base": "base model, full cache",
    "pte": "PTE",
    "pte-slots": "PTE, slots",
    "pte-value": "PTE, by value",
    "global-only": "Global-Only",
    "lora": "LoRA_c",
    "lora-detached": "LoRA_c, detached",
}


def report(folder: Path) -> str:
    """The tables as markdown; the figure goes to ``folder``."""
    results = same_base([result for result in load_runs(folder) if not result["name"].startswith("short")])
    arms = [result for result in results if result["name"] in ARM_NAMES]
    lengths = [evaluation["length"] for evaluation in arms[0]["evaluation"]]
    parts = [_arms(arms, index, length) for index, length in enumerate(lengths)]
    parts += [_controls(arms), _ablations(results, lengths)]
    draw(arms, folder / "memory.png")
    return "\n\n".join(part for part in parts if part)


def report_evictions(folder: Path) -> str:
    """The table of policies as markdown: recall with and without a state, by what leaves."""
    results = same_base([result for result in load_runs(folder) if result["name"].startswith("short")])
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["name"].removeprefix("short-"), []).append(result)
    rows = []
    for arm, name in EVICTION_ARMS.items():
        for policy in ("sliding_window", *EVICTIONS):
            runs = found.get(arm if policy == "sliding_window" else f"{arm}-evict-{policy}")
            if runs:
                evaluations = [run["evaluation"][0] for run in runs]
                rows.append(_row(f"{name}, `{policy}`", evaluations, [run["seed"] for run in runs]))
    counts = results[0]["evaluation"][0]
    return f"**Facts recalled, %, traces of {counts['length']} thoughts** (n per seed).\n\n" + _table(
        rows, "what leaves", counts["buckets"]
    )


def _row(name: str, evaluations: list[dict[str, Any]], seeds: list[int]) -> str:
    cells = [_cell([evaluation["buckets"][key] for evaluation in evaluations]) for key in COLUMNS]
    running = _cell([evaluation["running"] for evaluation in evaluations])
    return f"| {name} | {', '.join(map(str, seeds))} | " + " | ".join([*cells, running]) + " |"


def _cell(shares: list[dict[str, float]]) -> str:
    """One run: accuracy and half its 95 % interval. Several: their mean and range."""
    percent = [100 * share["accuracy"] for share in shares if share["n"]]
    if not percent:
        return ""
    if len(percent) == 1:
        return f"{percent[0]:.1f} ± {50 * (shares[0]['high'] - shares[0]['low']):.1f}"
    return f"{sum(percent) / len(percent):.1f} ({min(percent):.1f}-{max(percent):.1f})"


def _table(rows: list[str], first: str, counts: dict[str, Any] | None = None) -> str:
    names = list(COLUMNS.values())
    if counts is not None:
        names = [f"{name}, n = {counts[key]['n']}" for key, name in COLUMNS.items()]
    head = [first, "seeds", *names, "running state"]
    return "\n".join(["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2), *rows])


def _arms(arms: list[dict[str, Any]], index: int, length: int) -> str:
    rows = []
    for arm, name in ARM_NAMES.items():
        found = [result for result in arms if result["name"] == arm]
        if found:
            rows.append(_row(name, [result["evaluation"][index] for result in found], [r["seed"] for r in found]))
    counts = arms[0]["evaluation"][index]["buckets"]
    return f"**Facts recalled, %, traces of {length} thoughts** (n per seed).\n\n" + _table(rows, "arm", counts)


def _controls(arms: list[dict[str, Any]]) -> str:
    rows = []
    for arm in ("pte", "pte-slots"):
        found = [result for result in arms if result["name"] == arm]
        rows += [
            _row(f"{ARM_NAMES[arm]}: {name}", [result[key] for result in found], [result["seed"] for result in found])
            for key, name in (("swapped_evictions", "evictions of another sequence"), ("frozen_state", "S stays S0"))
            if found
        ]
    return "**Controls of the trained PTE models.**\n\n" + _table(rows, "control") if rows else ""


def _ablations(results: list[dict[str, Any]], lengths: list[int]) -> str:
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        if result["name"] == "pte" or result["name"] not in ARM_NAMES:
            runs.setdefault(result["name"].removeprefix("pte-"), {})[result["seed"]] = result
    default = runs.pop("pte", {})
    # Seeds have base models of their own: what was changed is compared on its own seeds.
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, found in sorted(runs.items()):
        groups.setdefault(tuple(found), []).append(name)
    parts = []
    for index, length in enumerate(lengths if groups else []):
        rows = []
        for seeds, names in sorted(groups.items(), key=lambda group: -len(group[0])):
            for label, found in [("none", default), *((name, runs[name]) for name in names)]:
                here = [seed for seed in seeds if seed in found]
                if here:
                    rows.append(_row(label, [found[seed]["evaluation"][index] for seed in here], here))
        parts.append(f"**One change at a time, traces of {length} thoughts.**\n\n" + _table(rows, "change"))
    return "\n\n".join(parts)


def draw(arms: list[dict[str, Any]], path: Path) -> None:
    """Recall against distance in windows: one line per arm, one faint line per seed; longest traces."""
    drawing, axis = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    for colour, (arm, name) in enumerate(ARM_NAMES.items()):
        lines = [
            {
                bin_["up_to_windows"]: bin_["accuracy"]
                for bin_ in result["evaluation"][-1]["by_distance"]
                if bin_["n"] >= 30
            }
            for result in arms
            if result["name"] == arm
        ]
        if not lines:
            continue
        places = sorted(set.intersection(*(set(line) for line in lines)))
        for line in lines:
            axis.plot(places, [line[place] for place in places], color=f"C{colour}", linewidth=0.7, alpha=0.4)
        mean = [sum(line[place] for line in lines) / len(lines) for place in places]
        axis.plot(places, mean, color=f"C{colour}", label=name, marker="o", markersize=3.5)
    layers = arms[0]["settings"]["layers"]
    axis.axvline(layers, color="0.6", linewidth=1, linestyle="--")
    axis.text(layers, 0.4, " layers x window", color="0.4")
    axis.axhline(CHANCE, color="0.6", linewidth=1, linestyle=":")
    axis.set(xlabel="distance to the fact, in windows", ylabel="facts recalled", ylim=(0, 1.02), xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 0.9))
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
