"""The table and the figure from `results/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from ..common.intervals import wilson
from ..common.pages import table
from ..machine import load_runs
from .evaluate import bootstrap, evictions, per_problem, solved
from .run import changes, name_of
from .settings import ARMS, Settings
from .task import TASKS

Result = dict[str, Any]
HEADER = [
    "task",
    "arm",
    "seeds",
    "pass@1 before",
    "pass@1 after",
    "gain",
    "pass@8 before",
    "pass@8 after",
    "right at any length, before -> after",
    "tokens of thought",
    "evictions",
    "max abs log ratio",
    "cache MB",
    "peak GB",
    "tokens/s rollout / step",
    "minutes",
]
K = 8


def report(folder: Path) -> str:
    """The tables as markdown, one per form; the figures go to ``folder``."""
    results = load_runs(folder)
    parts = []
    for form in dict.fromkeys(result["form"] for result in results):
        found = [result for result in results if result["form"] == form]
        name = "reasoning.png" if form == "default" else f"reasoning-{form}.png"
        draw(found, folder / name)
        parts.append(render(found))
    return "\n\n".join(parts)


def render(results: list[Result]) -> str:
    """The table of one form, and where it comes from."""
    rows = [_row(task, arm, found) for task, arm, found in _groups(results)]
    return f"{_origin(results)}\n\n{table(HEADER, rows, left=2)}"


def _groups(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """Runs that differ by their seed alone, with their task and arm, in the order of the table."""
    named: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        settings = result["settings"]
        named.setdefault((settings["task"], settings["arm"], name_of(result)), []).append(result)
    tasks, arms = list(TASKS), list(ARMS)
    order = sorted(named, key=lambda key: (tasks.index(key[0]), arms.index(key[1]), key[2]))
    return [(task, arm, named[task, arm, name]) for task, arm, name in order]


def passes(found: list[Result], when: str, k: int) -> list[float]:
    """pass@k of each problem, the mean over seeds; ``when`` is ``before`` or ``after``."""
    rows = [per_problem(solved(result[when], result["settings"]["min_thought"]), k) for result in found]
    return [_mean(column) for column in zip(*rows, strict=True)]


def _row(task: str, arm: str, found: list[Result]) -> list[str]:
    settings = Settings(**found[0]["settings"])
    one = {when: passes(found, when, 1) for when in ("before", "after")}
    eight = {when: passes(found, when, K) for when in ("before", "after")}
    gains = [after - before for before, after in zip(one["before"], one["after"], strict=True)]
    any_length = [
        _mean([ok for result in found for row in result[when]["right"] for ok in row]) for when in ("before", "after")
    ]
    lengths = [length for result in found for row in result["after"]["lengths"] for length in row]
    curve = [step for result in found for step in result["training"]["curve"]]
    tokens = sum(step["tokens"] for step in curve)
    rollout = tokens / sum(step["rollout_seconds"] for step in curve)
    held = max(step.get("cache_bytes") or step["full_cache_bytes"] for step in curve)
    peaks = [result["training"]["peak_bytes"] for result in found]
    return [
        task,
        ", ".join([ARMS[arm], *(f"{name} {value}" for name, value in changes(found[0]).items())]),
        ", ".join(str(result["seed"]) for result in found),
        _cell(one["before"], bootstrap),
        _cell(one["after"], bootstrap),
        _cell(gains, bootstrap, signed=True),
        _cell(eight["before"], _wilson),
        _cell(eight["after"], _wilson),
        " -> ".join(f"{100 * share:.1f}" for share in any_length),
        f"{_mean(lengths):.0f}",
        f"{_mean([evictions(length, settings) for length in lengths]):.1f}" if settings.bounded else "none",
        f"{max(step['max_log_ratio'] for step in curve):.0e}",
        f"{held / 1e6:.1f}",
        "" if None in peaks else f"{max(peaks) / 1e9:.2f}",
        f"{rollout:.0f} / {tokens / sum(step['seconds'] for step in curve):.0f}",
        f"{_mean([result['seconds'] for result in found]) / 60:.1f}",
    ]


def _cell(values: list[float], interval: Callable[[list[float]], tuple[float, float]], signed: bool = False) -> str:
    low, high = interval(values)
    sign = "+" if signed else ""
    return f"{100 * _mean(values):{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _wilson(values: list[float]) -> tuple[float, float]:
    """Exact in its variance where every value is 0 or 1, as pass@k is from k samples, and too wide otherwise.

    Unlike the bootstrap it does not collapse where all problems are solved.
    """
    return wilson(_mean(values), len(values))


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _origin(results: list[Result]) -> str:
    first = results[0]
    s = first["settings"]
    batch = s["prompts"] * s["generations"]
    leave = Settings(**s).evict
    hardware = first["gpu"] or f"{first['cpu']}, {first['cores']} cores, {first['threads']} thread(s), no GPU"
    commits = ", ".join(sorted({(r["commit"] or "unknown")[:12] + (" changed" if r["dirty"] else "") for r in results}))
    commands = ", ".join(f"`{command}`" for command in sorted({result["command"] for result in results}))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    steps = "/".join(map(str, sorted({result["settings"]["steps"] for result in results})))
    return (
        f"**{Path(s['model']).name}, {s['dtype']}, {steps} steps of {batch} completions of at most {s['max_completion']} "
        f"tokens, window {s['window']}, {leave} leave together, an answer counts after {s['min_thought']} tokens; "
        f"{s['evaluation_problems']} problems x {s['samples']} samples.** Per cent, with 95 % intervals over problems: "
        f"bootstrap (pass@1, gain: paired), Wilson (pass@{K}). {commands}; {hardware}; commit {commits}; {versions}."
    )


def draw(results: list[Result], path: Path) -> None:
    """Per task: the reward over steps by arm, and pass@1 before and after with its intervals."""
    tasks = [task for task in TASKS if any(result["settings"]["task"] == task for result in results)]
    drawing, axes = plt.subplots(len(tasks), 2, figsize=(9.6, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        groups = [(arm, found) for name, arm, found in _groups(results) if name == task]
        for place, (arm, found) in enumerate(groups):
            colour = f"C{list(ARMS).index(arm)}"
            curves = [[step["reward"] for step in result["training"]["curve"]] for result in found]
            rewards = [_mean(column) for column in zip(*curves, strict=True)]
            span = max(2, len(rewards) // 4)
            smooth = [_mean(rewards[max(0, i + 1 - span) : i + 1]) for i in range(len(rewards))]
            steps = range(1, len(rewards) + 1)
            left.plot(steps, rewards, "o", color=colour, markersize=3, alpha=0.35)
            left.plot(steps, smooth, color=colour, label=ARMS[arm])
            for offset, when, face in ((-0.12, "before", "white"), (0.12, "after", colour)):
                values = passes(found, when, 1)
                low, high = bootstrap(values)
                mean = _mean(values)
                error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
                right.errorbar(
                    place + offset, mean, error, fmt="o", color=colour, markerfacecolor=face, capsize=3, label=None
                )
        left.set(title=f"{task}: reward (dots: steps, line: mean of the last {span})", xlabel="step", ylim=(0, None))
        right.set(title=f"{task}: pass@1 before (hollow) and after", ylim=(0, None), xlim=(-0.5, len(groups) - 0.5))
        right.set_xticks(range(len(groups)), [ARMS[arm] for arm, _ in groups], fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
