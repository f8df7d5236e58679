"""Tables and figures of docs/evidence.md from the results: distillation beside supervision, windows, GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from ..machine import load_runs
from ..small import same_base

ARM_NAMES = {
    "lora-full": "LoRA, full cache",
    "lora": "LoRA_c",
    "lora-key_diff": "LoRA_c, `key_diff`",
    "global-only": "Global-Only",
    "linear": "PTE, linear",
    "softmax": "PTE, softmax",
    "slots": "PTE, slots",
    "slots-key_diff": "PTE, slots, `key_diff`",
}
KINDS = {"supervise": "supervision", "distil": "distillation", "grpo": "GRPO", "lora": "LoRA on the full cache"}
COLOURS = {name: f"C{index}" for index, name in enumerate(ARM_NAMES)}

Run = dict[str, Any]


def report(folder: Path) -> str:
    """All tables as markdown; the figures go to ``folder``."""
    runs = load_runs(folder)
    for task in {run["task"] for run in runs}:
        same_base([{**run, "settings": {"base_seed": run["base_seed"]}} for run in runs if run["task"] == task])
    draw_windows(runs, folder / "windows.png")
    draw_grpo(runs, folder / "grpo.png")
    parts = [methods(runs), windows(runs), grpo(runs)]
    return "\n\n".join(part for part in parts if part)


def tuning(folder: Path) -> str:
    """The runs that learning rates were chosen by, of another seed; no figure."""
    runs = load_runs(folder)
    return "\n\n".join(part for part in (methods(runs), grpo(runs)) if part)


def recipe(run: Run) -> str:
    """The stages of a run in words."""
    parts = []
    for part in run["settings"]["stages"]:
        beta = "" if not part["beta"] else f", beta {part['beta']:g}"
        parts.append(f"{KINDS[part['kind']]} {part['steps']} ({part['rate']:g}{beta})")
    return ", then ".join(parts) + (", windows drawn" if run["settings"]["ranged"] else "")


def groups(runs: Sequence[Run], **wanted: Any) -> list[list[Run]]:
    """Runs that differ by their seed alone, in the order of the arms."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if all(run[name] == value for name, value in wanted.items()):
            found.setdefault(run["name"], []).append(run)
    order = list(ARM_NAMES)
    return sorted(found.values(), key=lambda part: (order.index(part[0]["arm"]), part[0]["name"]))


def is_grpo(run: Run) -> bool:
    """Whether it ends with GRPO."""
    return bool(run["settings"]["stages"][-1]["kind"] == "grpo")


def at(run: Run, window: int | None) -> Run:
    """The evaluation under a window."""
    found: Run = next(row for row in run["evaluation"] if row["window"] == window)
    return found


def trained(run: Run) -> Run:
    """The evaluation under the window of the config."""
    return at(run, run["config"]["cache_window"])


def percent(shares: Sequence[dict[str, Any]]) -> str:
    """Mean over seeds and their range; of one seed its 95 % interval. Nothing where nothing was asked."""
    values = [100 * share["accuracy"] for share in shares if share["n"]]
    if not values:
        return ""
    if len(values) == 1:
        share = next(share for share in shares if share["n"])
        return f"{values[0]:.1f} ({100 * share['low']:.1f}-{100 * share['high']:.1f})"
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def seeds(part: Sequence[Run]) -> str:
    """As a cell."""
    return ", ".join(str(run["seed"]) for run in sorted(part, key=lambda run: run["seed"]))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    if not rows:
        return ""
    lines = [title, "", "| " + " | ".join(head) + " |", "| --- | --- | --- |" + " ---: |" * (len(head) - 3)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def methods(runs: Sequence[Run]) -> str:
    """Supervision and distillation at equal steps, by task."""
    tables = []
    for task in dict.fromkeys(run["task"] for run in runs):
        extra = {"memory": ["running state"], "notes": ["KL by windows, nats", "perplexity"]}.get(task, [])
        rows = []
        for part in groups(runs, task=task):
            if is_grpo(part[0]) or part[0]["settings"]["ranged"]:
                continue
            cells = [ARM_NAMES[part[0]["arm"]], recipe(part[0]), seeds(part)]
            cells += [percent([trained(run)[key] for run in part]) for key in ("recall", "in_window", "evicted")]
            cells.append(percent([run["swapped_evictions"]["evicted"] for run in part if "swapped_evictions" in run]))
            if task == "memory":
                cells.append(percent([trained(run)["running"] for run in part]))
            elif task == "notes":
                kl = zip(*(trained(run)["kl_by_windows"] for run in part), strict=True)
                cells.append(", ".join(f"{sum(values) / len(part):.3f}" for values in kl))
                cells.append(f"{sum(trained(run)['perplexity'] for run in part) / len(part):.2f}")
            rows.append(cells)
        first = {"permutation": "all answers", "memory": "beyond relay", "notes": "out of the window"}[task]
        base = [
            run["base_full_cache"] for run in {run["base_seed"]: run for run in runs if run["task"] == task}.values()
        ]
        head = ["arm", "recipe", "seeds", first, "in the window", "evicted", "evicted, another's state", *extra]
        title = f"**{task.capitalize()}: right at the trained window, %.** The base model with its full cache: {percent([row['all' if 'all' in row else 'recall'] for row in base])}."
        if task == "notes":
            title += f" Its perplexity: {base[0]['perplexity']:.2f}."
        tables.append(_table(head, rows, title))
    return "\n\n".join(part for part in tables if part)


def curves(runs: Sequence[Run], task: str) -> str:
    """Recall and what is in the window over the steps of a task's runs, from the probes on the way."""
    found = [part for part in groups(runs, task=task) if part[0]["curve"]]
    steps = [row["step"] for row in found[0][0]["curve"]] if found else []
    rows = []
    for part in found:
        first = part[0]["curve"][0]["step"]
        for name in ("recall", "in_window"):
            cells = [ARM_NAMES[part[0]["arm"]], recipe(part[0]), seeds(part), name.replace("_", " ")]
            for place in range(len(steps)):
                values = [100 * run["curve"][place][name] for run in part]
                spread = f" ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else ""
                cells.append(f"{sum(values) / len(values):.0f}{spread}")
            rows.append(cells)
    head = ["arm", "recipe", "seeds", "", *(str(step - first) for step in steps)]
    return _table(head, rows, f"**{task.capitalize()}: right at the trained window, %, by step.**")


def converted(folder: Path) -> str:
    """Runs that go on from a converted LoRA beside runs that start from nothing."""
    return curves(load_runs(folder), "shifted")


def windows(runs: Sequence[Run]) -> str:
    """Adapters at windows that they were and were not trained at."""
    tables = []
    for task in dict.fromkeys(run["task"] for run in runs):
        rows = []
        found = [part for part in groups(runs, task=task) if not is_grpo(part[0]) and len(part[0]["evaluation"]) > 1]
        for part in found:
            if part[0]["settings"]["stages"][-1]["kind"] == "distil":
                key = "all" if "all" in trained(part[0]) else "recall"
                shares = [percent([row[key] for row in (at(run, window) for run in part)]) for window in _probed(found)]
                rows.append([ARM_NAMES[part[0]["arm"]], recipe(part[0]), seeds(part), *shares])
        head = ["arm", "recipe", "seeds", *(f"W = {window}" if window else "full cache" for window in _probed(found))]
        tables.append(
            _table(head, rows, f"**{task.capitalize()}: right by window of the evaluation, all that is asked, %.**")
        )
    return "\n\n".join(part for part in tables if part)


def _probed(found: Sequence[Sequence[Run]]) -> list[int | None]:
    return [row["window"] for row in found[0][0]["evaluation"]] if found else []


def grpo(runs: Sequence[Run]) -> str:
    """Greedy recall before and after GRPO, and the gain of each seed."""
    rows = []
    for part in groups(runs):
        if not is_grpo(part[0]):
            continue
        ordered = sorted(part, key=lambda run: run["seed"])
        before = [run["stages"][-2]["after"] for run in ordered]
        gains = [
            100 * (trained(run)["recall"]["accuracy"] - old["recall"]["accuracy"])
            for run, old in zip(ordered, before, strict=True)
        ]
        apart = sum(
            trained(run)["recall"]["low"] > old["recall"]["high"] for run, old in zip(ordered, before, strict=True)
        )
        cells = [ARM_NAMES[part[0]["arm"]], recipe(part[0]), seeds(part)]
        cells += [percent([old["recall"] for old in before]), percent([trained(run)["recall"] for run in ordered])]
        cells += [", ".join(f"{gain:+.1f}" for gain in gains), f"{apart} of {len(ordered)}"]
        cells += [percent([old["evicted"] for old in before]), percent([trained(run)["evicted"] for run in ordered])]
        cells.append(percent([run["swapped_evictions"]["evicted"] for run in ordered if "swapped_evictions" in run]))
        rows.append(cells)
    head = [
        "arm",
        "recipe",
        "seeds",
        "greedy, before",
        "after",
        "gain by seed",
        "intervals apart",
        "evicted, before",
        "after",
    ]
    return _table(
        [*head, "evicted, another's state"], rows, "**GRPO: greedy answers that are right at the trained window, %.**"
    )


def draw_windows(runs: Sequence[Run], path: Path) -> None:
    """Accuracy against the size of the cache, by task: the figure at the top of the page."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    drawing, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.9), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        sizes: list[int | None] = []
        for part in groups(runs, task=task):
            kind = part[0]["settings"]["stages"][-1]["kind"]
            if len(part[0]["evaluation"]) < 2 or kind == "supervise":
                continue
            key = "all" if "all" in trained(part[0]) else "recall"
            sizes = [row["window"] for row in part[0]["evaluation"]]
            means = [sum(at(run, size)[key]["accuracy"] for run in part) / len(part) for size in sizes]
            stroke = ":" if kind == "grpo" else "-" if part[0]["settings"]["ranged"] else "--"
            stages = part[0]["settings"]["stages"]
            how = f"GRPO after {KINDS[stages[-2]['kind']]}" if kind == "grpo" else KINDS[kind]
            drawn = ", windows drawn" if part[0]["settings"]["ranged"] else ""
            label = f"{ARM_NAMES[part[0]['arm']].replace('`', '')}, {how}{drawn}"
            axis.plot(
                range(len(sizes)), means, stroke, marker="o", markersize=4, color=COLOURS[part[0]["arm"]], label=label
            )
        base = [run["base_full_cache"] for run in runs if run["task"] == task]
        full = sum(row["all" if "all" in row else "recall"]["accuracy"] for row in base) / len(base)
        axis.axhline(full, color="0.5", linewidth=1)
        axis.text(0, full, "base model, full cache", color="0.4", va="bottom")
        axis.set(title=task, xlabel="window, thoughts", ylabel="right", ylim=(0, 1.08))
        axis.set_xticks(range(len(sizes)), [str(size or "all") for size in sizes])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)


def draw_grpo(runs: Sequence[Run], path: Path) -> None:
    """Greedy recall over steps, each seed a line."""
    found = [run for run in runs if is_grpo(run) and run["curve"]]
    if not found:
        return
    drawing, axis = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for part in groups(found):
        for index, run in enumerate(part):
            stages = run["settings"]["stages"]
            start = sum(stage["steps"] for stage in stages[:-1])
            points = [(row["step"] - start, row["recall"]) for row in run["curve"] if row["step"] >= start]
            points = [(0, run["stages"][-2]["after"]["recall"]["accuracy"]), *points]
            beta = f", beta {stages[-1]['beta']:g}" if stages[-1]["beta"] else ""
            first = f" after {KINDS[stages[-2]['kind']]} {stages[-2]['steps']}"
            label = ARM_NAMES[run["arm"]] + beta + first if index == 0 else None
            stroke = "--" if stages[-1]["beta"] else ":" if stages[-2]["kind"] == "distil" else "-"
            axis.plot(*zip(*points, strict=True), stroke, color=COLOURS[run["arm"]], alpha=0.8, label=label)
    axis.set(xlabel="steps of GRPO", ylabel="greedy answers right", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
