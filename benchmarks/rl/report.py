"""The table and the figure from `results/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..machine import load_runs
from ..small import same_base
from ..theory import full_cache_bytes
from .model import new_model
from .task import CHANCE, make_problems

ARM_NAMES = {"lora-full": "LoRA, full cache", "lora": "LoRA_c", "global-only": "Global-Only", "pte": "PTE"}
PROTOCOL_NAMES = {"straight": "GRPO after the base model's SFT", "warm": "GRPO after an SFT of the adapter, too"}
CONTROLLED = ("in_window", "evicted", "beyond_relay")
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
    arms, protocols = list(ARM_NAMES), list(PROTOCOL_NAMES)
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
    """Reward curves of both protocols, accuracy by cache, memory and speed. Other settings of an arm stay in the table."""
    main: dict[tuple[str, str], list[Run]] = {}
    for (protocol, arm, name), runs in groups.items():
        # The run of an arm under no other settings, else its first.
        if name == f"{arm}-{protocol}" or (protocol, arm) not in main:
            main[protocol, arm] = runs
    drawing, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained", width_ratios=(3, 3, 3, 2))
    for axis, protocol in zip(axes, PROTOCOL_NAMES, strict=False):
        _curves(axis, {arm: runs for (shown, arm), runs in main.items() if shown == protocol})
        axis.set(title=PROTOCOL_NAMES[protocol], xlabel="GRPO step", ylabel="reward (share of answers right)")
    warm = {arm: runs for (protocol, arm), runs in main.items() if protocol == "warm"}
    last = warm or {arm: runs for (_, arm), runs in main.items()}
    _by_window(axes[2], last)
    _costs(axes[3], last)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _colour(arm: str) -> str:
    return f"C{list(ARM_NAMES).index(arm)}"


def _curves(axis: Axes, arms: dict[str, list[Run]]) -> None:
    for arm, runs in arms.items():
        rewards = [_smoothed(run["grpo"]["curve"]["reward"]) for run in runs]
        length = min(map(len, rewards))
        columns = [[reward[step] for reward in rewards] for step in range(length)]
        steps = [step + SMOOTH for step in range(length)]
        axis.plot(steps, [sum(column) / len(column) for column in columns], color=_colour(arm), label=ARM_NAMES[arm])
        axis.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=_colour(arm), alpha=0.2, linewidth=0)
    axis.axhline(CHANCE, color="0.6", linewidth=1, linestyle=":")
    axis.set(ylim=(0, 1.02), xlim=(0, None))
    if arms:
        axis.legend(frameon=False, loc=(0.55, 0.62))


def _smoothed(values: list[float]) -> list[float]:
    return [sum(values[end - SMOOTH : end]) / SMOOTH for end in range(SMOOTH, len(values) + 1)]


def _by_window(axis: Axes, arms: dict[str, list[Run]]) -> None:
    for arm, runs in arms.items():
        rows = [row for row in runs[0]["evaluation"] if row["decoding"] == "sampled"]
        places = range(len(rows))
        shares = [[_at(run, row["window"])["reward"]["accuracy"] for run in runs] for row in rows]
        means = [sum(share) / len(share) for share in shares]
        bars = [[mean - min(share) for mean, share in zip(means, shares, strict=True)]]
        bars += [[max(share) - mean for mean, share in zip(means, shares, strict=True)]]
        axis.errorbar(
            places, means, bars, color=_colour(arm), marker="o", markersize=4, capsize=3, label=ARM_NAMES[arm]
        )
        axis.set_xticks(list(places), [str(row["window"] or "all") for row in rows])
    axis.axhline(CHANCE, color="0.6", linewidth=1, linestyle=":")
    axis.set(
        title="After GRPO, by cache window", xlabel="thoughts the cache holds", ylabel="answers right", ylim=(0, 1.02)
    )


def _costs(axis: Axes, arms: dict[str, list[Run]]) -> None:
    for place, (arm, runs) in enumerate(arms.items()):
        megabytes = 1e-6 * peak_cache(runs[0])
        speed = sum(run["grpo"]["rollout_tokens_per_second"] for run in runs) / len(runs)
        axis.bar(place, megabytes, color=_colour(arm), width=0.7)
        axis.text(place, megabytes, f"{speed / 1000:.1f}k\ntokens/s", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(arms)), [ARM_NAMES[arm].replace(", ", ",\n") for arm in arms], fontsize=7)
    axis.set(title="Peak cache, speed of rollouts", ylabel="MB")
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
