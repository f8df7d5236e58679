"""The table and the figure from `results/*.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..common.arithmetic import full_cache_bytes
from ..machine import load_runs
from ..small import same_base
from .model import new_model
from .task import CHANCE, make_problems
from .train import PROTOCOLS, Settings

ARM_NAMES = {"lora-full": "LoRA, full cache", "lora": "LoRA_c", "global-only": "Global-Only", "pte": "PTE"}
CONTROLLED = ("in_window", "evicted", "beyond_relay")
USUAL_GRPO = {"grpo_steps": Settings.grpo_steps, "learning_rate": Settings.learning_rate}
SMOOTH = 5
"""Steps that a point of a reward curve averages."""

Run = dict[str, Any]


def report(folder: Path) -> str:
    """The tables as markdown; the figure goes to ``folder``."""
    groups = grouped(same_base(load_runs(folder)))
    draw(groups, folder / "rl.png")
    return "\n\n".join(part for part in (table(groups), controls(groups)) if part)


def grouped(results: list[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs that differ by their seed alone, by (protocol, arm, name), in the order of the table."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for result in results:
        groups.setdefault((result["protocol"], result["arm"], result["name"]), []).append(result)
    arms, protocols = list(ARM_NAMES), list(PROTOCOLS)
    return dict(
        sorted(groups.items(), key=lambda item: (protocols.index(item[0][0]), arms.index(item[0][1]), item[0][2]))
    )


def table(groups: dict[tuple[str, str, str], list[Run]]) -> str:
    """One row per arm and protocol; shares in percent, the mean over seeds and their range (one seed: a 95 % interval).

    Sampled and greedy rewards, and greedy recall, under the trained window before and after GRPO; then the sampled reward
    under other windows.
    """
    windows = [row["window"] for row in next(iter(groups.values()))[0]["evaluation"] if row["decoding"] == "sampled"]
    head = ["run", "seeds", "reward, sampled", "after", "reward, greedy", "after", "evicted, greedy", "after"]
    head += ["beyond relay, greedy", "after", "all right, sampled", *(f"W = {window or 'all'}" for window in windows)]
    head += ["cache, MB", "tokens/s", "s a step", "max abs log ratio"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for (_, _, name), runs in groups.items():
        cells = [name, ", ".join(str(run["seed"]) for run in runs)]
        for key, decoding in (
            ("reward", "sampled"),
            ("reward", "greedy"),
            ("evicted", "greedy"),
            ("beyond_relay", "greedy"),
        ):
            cells.append(_shares([_decoded(run["before_grpo"], decoding)[key] for run in runs]))
            cells.append(_shares([_trained(run, decoding)[key] for run in runs]))
        cells.append(_shares([_trained(run)["exact"] for run in runs]))
        cells += [_shares([_at(run, window)["reward"] for run in runs]) for window in windows]
        cells.append(_mean(runs, peak_cache, "{:.2f}", 1e-6))
        cells.append(_mean(runs, lambda run: run["grpo"]["rollout_tokens_per_second"], "{:.0f}"))
        cells.append(_mean(runs, lambda run: _median(run["grpo"]["curve"]["step_seconds"]), "{:.2f}"))
        cells.append(f"{max(run['grpo']['max_log_ratio'] for run in runs):.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def controls(groups: dict[tuple[str, str, str], list[Run]]) -> str:
    """The trained models when their encoders read what another sequence lost, sampled."""
    lines = [
        "**Evictions of another sequence**, after GRPO, sampled.",
        "",
        "| run | seeds | in the window | evicted | beyond relay |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (_, _, name), runs in groups.items():
        found = [run for run in runs if "swapped_evictions" in run]
        if found:
            cells = [_shares([run["swapped_evictions"][key] for run in found]) for key in CONTROLLED]
            lines.append(f"| {name} | {', '.join(str(run['seed']) for run in found)} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def peak_cache(run: Run) -> float:
    """Bytes that the cache of a GRPO step holds at most: logged under a window, computed for a full cache, which logs none.

    The last token of a completion is never fed back, and a completion is taken to be as long as its solution.
    """
    logged = [nbytes for nbytes in run["grpo"]["curve"]["cache_bytes"] if nbytes is not None]
    if logged:
        return max(logged)
    settings = run["settings"]
    example = make_problems(1, settings["steps"], settings["asked"], torch.Generator())
    return full_cache_bytes(
        new_model(settings["layers"]).config,
        batch=settings["prompts"] * settings["generations"],
        prompt=example.prompt_ids.shape[1],
        length=example.completion_ids.shape[1] - 1,
        itemsize=torch.float32.itemsize,
    )


def _decoded(rows: list[Run], decoding: str) -> Run:
    return next(row for row in rows if row["decoding"] == decoding)


def _at(run: Run, window: int | None, decoding: str = "sampled") -> Run:
    return _decoded([row for row in run["evaluation"] if row["window"] == window], decoding)


def _trained(run: Run, decoding: str = "sampled") -> Run:
    return _at(run, run["config"]["cache_window"], decoding)


def _shares(shares: list[dict[str, float]]) -> str:
    percent = [100 * share["accuracy"] for share in shares if share["n"]]
    if not percent:
        return ""
    if len(percent) == 1:
        return f"{percent[0]:.1f} ± {50 * (shares[0]['high'] - shares[0]['low']):.1f}"
    return f"{sum(percent) / len(percent):.1f} ({min(percent):.1f}-{max(percent):.1f})"


def _mean(runs: list[Run], figure: Callable[[Run], float], form: str, scale: float = 1.0) -> str:
    return form.format(scale * sum(figure(run) for run in runs) / len(runs))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def draw(groups: dict[tuple[str, str, str], list[Run]], path: Path) -> None:
    """The supervised start, rewards of GRPO, accuracy before and after it, and the cache; one colour per arm and method."""
    lines: dict[str, dict[int, list[Run]]] = {}
    for runs in groups.values():
        settings = runs[0]["settings"]
        # Other settings of GRPO stay in the table.
        if all(settings[name] == usual for name, usual in USUAL_GRPO.items()):
            lines.setdefault(_label(runs[0]), {})[_supervised(runs[0])] = runs
    drawing, axes = plt.subplots(1, 4, figsize=(16, 4.0), layout="constrained", width_ratios=(3, 3, 3.6, 2))
    for colour, (label, by_steps) in enumerate(lines.items()):
        style = {"color": f"C{colour}", "label": label}
        longest, shortest = by_steps[max(by_steps)], by_steps[min(by_steps)]
        starts = [run["warm_up"]["curve"] for run in longest if "warm_up" in run]
        if starts:
            steps = [point["step"] for point in starts[0]]
            _band(axes[0], steps, [[_recalled(point) for point in curve] for curve in starts], **style)
        rewards = [_smoothed(run["grpo"]["curve"]["reward"]) for run in shortest]
        _band(axes[1], range(SMOOTH, SMOOTH + min(map(len, rewards))), rewards, **style)
    _before_and_after(axes[2], lines)
    _costs(axes[3], {label: by_steps[min(by_steps)] for label, by_steps in lines.items()})
    axes[0].set(title="Supervised start: evicted states right", xlabel="step", ylim=(0, 1.02))
    axes[1].set(title="GRPO: reward, sampled", xlabel="step", ylim=(0, 1.02))
    for axis in axes[:3]:
        axis.axhline(CHANCE, color="0.6", linewidth=1, linestyle=":")
    if lines:
        axes[1].legend(frameon=False, fontsize=8, loc=(0.6, 0.56))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _label(run: Run) -> str:
    settings = run["settings"]
    changed = [str(value) for value in settings["overrides"].values()]
    start = [] if _supervised(run) else ["no supervised start"]
    return ", ".join([ARM_NAMES[run["arm"]], *changed, *start])


def _supervised(run: Run) -> int:
    settings = run["settings"]
    return PROTOCOLS[settings["protocol"]] if settings["warm_steps"] is None else settings["warm_steps"]


def _recalled(point: dict[str, float | None]) -> float:
    """Share of evicted states that are right given the right trace; of all states where nothing is evicted."""
    share = point["answers"] if point["evicted"] is None else point["evicted"]
    assert share is not None
    return share


def _band(axis: Axes, steps: Sequence[int], curves: list[list[float]], color: str, label: str) -> None:
    """The mean of ``curves`` and their range."""
    columns = list(zip(*(curve[: len(steps)] for curve in curves), strict=True))
    axis.plot(steps, [sum(column) / len(column) for column in columns], color=color, label=label)
    axis.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2, linewidth=0)


def _smoothed(values: list[float]) -> list[float]:
    return [sum(values[end - SMOOTH : end]) / SMOOTH for end in range(SMOOTH, len(values) + 1)]


def _before_and_after(axis: Axes, lines: dict[str, dict[int, list[Run]]]) -> None:
    """Greedy (square) and sampled (round) accuracy before GRPO (hollow) and after (filled), by supervised steps."""
    ticks: list[str] = []
    for colour, by_steps in enumerate(lines.values()):
        for steps, runs in sorted(by_steps.items()):
            for marker, offset, decoding in (("o", -0.16, "sampled"), ("s", 0.16, "greedy")):
                pairs = [(_decoded(run["before_grpo"], decoding), _trained(run, decoding)) for run in runs]
                before, after = (
                    sum(e["reward"]["accuracy"] for e in column) / len(pairs) for column in zip(*pairs, strict=True)
                )
                place = [len(ticks) + offset - 0.06, len(ticks) + offset + 0.06]
                axis.plot(place, [before, after], color=f"C{colour}", linewidth=1)
                axis.plot(place[:1], [before], marker, color=f"C{colour}", markerfacecolor="white", markersize=5)
                axis.plot(place[1:], [after], marker, color=f"C{colour}", markersize=5)
            ticks.append(f"{steps}")
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axis.set(
        title="Before GRPO (hollow) and after;\nround: sampled, square: greedy",
        xlabel="supervised steps before",
        ylabel="answers right",
        ylim=(0, 1.02),
    )


def _costs(axis: Axes, lines: dict[str, list[Run]]) -> None:
    for place, runs in enumerate(lines.values()):
        axis.bar(place, 1e-6 * peak_cache(runs[0]), color=f"C{place}", width=0.7)
    axis.set_xticks([])
    axis.set(title="Peak cache of rollouts", ylabel="MB")
