"""Tables and figures of what was recalled and learned, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.intervals import bootstrap, wilson
from ..common.pages import Section, grouped, origin, table
from ..common.records import Record, read
from .arms import ARMS, BASE_ARMS
from .measure import KEY
from .tasks.sums import pass_at_k, solved

KINDS = {"supervise": "supervision", "distil": "distillation", "grpo": "GRPO", "lora": "LoRA on the full cache"}
COLUMNS = {
    "in_window": "in the window",
    "to_1.5": "evicted, to 1.5 W",
    "to_2.5": "1.5 to 2.5 W",
    "over_2.5": "over 2.5 W",
    "recall": "beyond relay",
    "running": "running state",
}
"""Of facts, by distance."""
NOTES = ("notes", "few-notes")
K = 8
"""Of pass@k."""

Runs = Sequence[Record]


# What all tables share


def same_base(runs: Runs) -> Runs:
    """``runs`` themselves, if those of one task and seed of the base model started from the same weights.

    Raises:
        ValueError: They did not, so their arms cannot be compared.
    """
    for (task, seed), part in grouped(runs, lambda run: (run["task"], run["base_seed"])).items():
        if len({run["base_weights"] for run in part}) > 1:
            raise ValueError(
                f"Runs of one seed must share their base model, got several for {task}, seed {seed} (it is not the same on every "
                "machine). Run all arms of a seed on one machine."
            )
    return runs


def by_seed(runs: Runs, **wanted: Any) -> list[list[Record]]:
    """Runs that differ by their seed alone, in the order of the arms."""
    found = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    order = list(ARMS)
    groups = grouped(sorted(found, key=lambda run: run["seed"]), lambda run: run["name"]).values()
    return sorted(groups, key=lambda part: (order.index(part[0]["arm"]), part[0]["name"]))


def head(part: Runs) -> list[str]:
    """Arm, recipe, seeds."""
    return [ARMS[part[0]["arm"]][0], recipe(part[0]), ", ".join(str(run["seed"]) for run in part)]


def recipe(run: Record) -> str:
    """The stages of a run in words."""
    parts = []
    for stage in run["settings"]["stages"]:
        beta = "" if not stage["beta"] else f", beta {stage['beta']:g}"
        parts.append(f"{KINDS[stage['kind']]} {stage['steps']} ({stage['rate']:g}{beta})")
    return ", then ".join(parts) + (", windows drawn" if run["settings"]["ranged"] else "")


def last(run: Record, place: int = -1) -> str:
    """The kind of a stage, the last by default."""
    return str(run["settings"]["stages"][place]["kind"])


def trained(run: Record, length: int | None = None) -> Record:
    """The evaluation under the window of the config."""
    return at(run, run["config"]["cache_window"], length)


def at(run: Record, window: int | None, length: int | None = None) -> Record:
    """The evaluation under a window, and on traces of a length where there are several."""
    rows = (row for row in run["evaluation"] if row["window"] == window)
    return next(row for row in rows if length is None or row["length"] == length)


def whole(row: Record) -> Record:
    """The share of all that is asked."""
    found: Record = row["all" if "all" in row else "recall"]
    return found


def percent(shares: Iterable[Record]) -> str:
    """Mean over seeds and their range; of one seed its 95 % interval. Nothing where nothing was asked."""
    asked = [share for share in shares if share["n"]]
    if not asked:
        return ""
    values = [100 * share["accuracy"] for share in asked]
    low, high = min(values), max(values)
    if len(values) == 1:
        low, high = 100 * asked[0]["low"], 100 * asked[0]["high"]
    return f"{mean(values):.1f} ({low:.1f}-{high:.1f})"


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    values = list(values)
    return sum(values) / len(values)


def titled(title: str, header: Sequence[str], rows: list[list[str]]) -> list[str]:
    """A table under its title, or nothing where there are no rows."""
    return [f"{title}\n\n{table(header, rows, left=3)}"] if rows else []


# Recipes: distillation beside supervision, windows, GRPO


def recipes(runs: Runs) -> str:
    """Right at the trained window by recipe; by window; before and after GRPO."""
    tasks = [by_seed(same_base(runs), task=task) for task in dict.fromkeys(sorted(run["task"] for run in runs))]
    parts = [text for groups in tasks for text in methods(groups)] + [t for groups in tasks for t in windows(groups)]
    return "\n\n".join([origin(runs, commands=False), *parts, *grpo([g for groups in tasks for g in groups])])


def tuning(runs: Runs) -> str:
    """The runs that learning rates were chosen by."""
    tasks = [by_seed(runs, task=task) for task in dict.fromkeys(sorted(run["task"] for run in runs))]
    parts = [text for groups in tasks for text in methods(groups)]
    return "\n\n".join([origin(runs, commands=False), *parts, *grpo([g for groups in tasks for g in groups])])


def methods(groups: list[list[Record]]) -> list[str]:
    """Supervision and distillation of one task."""
    task = groups[0][0]["task"]
    rows = []
    for part in groups:
        if last(part[0]) == "grpo" or part[0]["settings"]["ranged"]:
            continue
        found = [trained(run) for run in part]
        cells = head(part) + [percent(row[key] for row in found) for key in ("recall", "in_window", "evicted")]
        cells.append(percent(run["swapped_evictions"]["evicted"] for run in part if "swapped_evictions" in run))
        if task == "memory":
            cells.append(percent(row["running"] for row in found))
        elif task in NOTES:
            kl = zip(*(row["kl_by_windows"] for row in found), strict=True)
            cells += [
                ", ".join(f"{mean(values):.3f}" for values in kl),
                f"{mean(row['perplexity'] for row in found):.2f}",
            ]
        rows.append(cells)
    extra, first = [], "all answers"
    if task == "memory":
        extra, first = ["running state"], "beyond relay"
    elif task in NOTES:
        extra, first = ["KL by windows, nats", "perplexity"], "out of the window"
    bases = {run["base_seed"]: run["base_full_cache"] for part in groups for run in part}.values()
    full = percent(whole(row) for row in bases)
    title = f"**{task.capitalize()}: right at the trained window, %.** The base model with its full cache: {full}."
    title += f" Its perplexity: {next(iter(bases))['perplexity']:.2f}." if task in NOTES else ""
    header = ["arm", "recipe", "seeds", first, "in the window", "evicted", "evicted, another's state", *extra]
    return titled(title, header, rows)


def windows(groups: list[list[Record]]) -> list[str]:
    """Adapters at windows that they were and were not trained at."""
    found = [part for part in groups if last(part[0]) == "distil" and len(part[0]["evaluation"]) > 1]
    sizes = [row["window"] for row in found[0][0]["evaluation"]] if found else []
    rows = [[*head(part), *(percent(whole(at(run, size)) for run in part) for size in sizes)] for part in found]
    header = ["arm", "recipe", "seeds", *(f"W = {size}" if size else "full cache" for size in sizes)]
    task = groups[0][0]["task"].capitalize()
    return titled(f"**{task}: right by window of the evaluation, all that is asked, %.**", header, rows)


def grpo(groups: list[list[Record]]) -> list[str]:
    """Greedy recall before and after GRPO, and the gain of each seed."""
    rows = []
    for part in groups:
        if last(part[0]) != "grpo":
            continue
        pairs = [(run["stages"][-2]["after"], trained(run)) for run in part]
        gains = [100 * (new["recall"]["accuracy"] - old["recall"]["accuracy"]) for old, new in pairs]
        apart = sum(new["recall"]["low"] > old["recall"]["high"] for old, new in pairs)
        recall, evicted = (
            [percent(pair[when][key] for pair in pairs) for when in (0, 1)] for key in ("recall", "evicted")
        )
        swapped = percent(run["swapped_evictions"]["evicted"] for run in part if "swapped_evictions" in run)
        told = [", ".join(f"{gain:+.1f}" for gain in gains), f"{apart} of {len(part)}"]
        rows.append([*head(part), *recall, *told, *evicted, swapped])
    header = ["arm", "recipe", "seeds", "greedy, before", "after", "gain by seed", "intervals apart"]
    header += ["evicted, before", "after", "evicted, another's state"]
    return titled("**GRPO: greedy answers that are right at the trained window, %.**", header, rows)


def converted(runs: Runs) -> str:
    """Runs that go on from a converted LoRA beside runs that start from nothing, by step."""
    groups = [part for part in by_seed(runs) if part[0]["curve"]]
    steps = [row["step"] for row in groups[0][0]["curve"]]
    rows = []
    for part in groups:
        for name in ("recall", "in_window"):
            curves = zip(*([100 * row[name] for row in run["curve"]] for run in part), strict=True)
            spread = "({:.0f}-{:.0f})" if len(part) > 1 else ""
            cells = [f"{mean(values):.0f} {spread.format(min(values), max(values))}".strip() for values in curves]
            rows.append([*head(part), name.replace("_", " "), *cells])
    header = ["arm", "recipe", "seeds", "", *(str(step - steps[0]) for step in steps)]
    title = f"**{groups[0][0]['task'].capitalize()}: right at the trained window, %, by step.**"
    return "\n\n".join([origin(runs, commands=False), *titled(title, header, rows)])


# Facts by distance


def distances(runs: Runs) -> str:
    """Facts recalled by distance, for each length of traces; controls."""
    groups = by_seed(same_base(runs))
    lengths = [row["length"] for row in groups[0][0]["evaluation"]]
    parts = []
    for length in lengths:
        counts = trained(groups[0][0], length)
        header = ["arm", "seeds", *(f"{name}, n = {counts[key]['n']}" for key, name in COLUMNS.items())]
        rows = [_distance(part, [trained(run, length) for run in part]) for part in groups]
        parts.append(
            f"**Facts recalled, %, traces of {length} thoughts** (n per seed).\n\n{table(header, rows, left=2)}"
        )
    rows = []
    for part in groups:
        for key, name in (("swapped_evictions", "evictions of another sequence"), ("frozen_state", "S stays S0")):
            if all(key in run for run in part) and part[0]["arm"] in ("linear", "slots"):
                rows.append(_distance(part, [run[key] for run in part], f": {name}"))
    if rows:
        header = ["control", "seeds", *COLUMNS.values()]
        parts.append(f"**Controls of the trained PTE models.**\n\n{table(header, rows, left=2)}")
    return "\n\n".join([origin(runs, commands=False), *parts])


def _distance(part: Runs, rows: Runs, what: str = "") -> list[str]:
    cells = [percent(row[key] for row in rows) for key in COLUMNS]
    return [ARMS[part[0]["arm"]][0] + what, ", ".join(str(run["seed"]) for run in part), *cells]


# SmolLM2 on reasoning-gym


def sums(runs: Runs) -> str:
    """GRPO of four arms, by what a task allows: pass@1 and pass@8 before and after, lengths, memory, speed."""
    parts = [origin(runs, commands=False)]
    for sizes in grouped(runs, lambda run: tuple(run["sizes"][name] for name in ("max_completion", "window"))).values():
        s, stage = sizes[0]["sizes"], sizes[0]["settings"]["stages"][-1]
        title = (
            f"**{s['model']}, float32, {stage['steps']} steps of {s['prompts'] * s['generations']} completions of at most "
            f"{s['max_completion']} tokens, window {s['window']}, an answer counts after {s['min_thought']} tokens; {s['count']} problems "
            f"x {s['samples']} samples.** Per cent, with 95 % intervals over problems: bootstrap (pass@1, gain: paired), Wilson (pass@{K})."
        )
        header = [
            "task",
            "arm",
            "seeds",
            "pass@1 before",
            "pass@1 after",
            "gain",
            f"pass@{K} before",
            f"pass@{K} after",
        ]
        header += ["right at any length, before -> after", "tokens of thought", "evictions", "max abs log ratio"]
        header += ["cache MB", "peak GB", "tokens/s rollout / step", "minutes"]
        parts += titled(title, header, [_sum(part) for part in by_seed(sizes)])
    return "\n\n".join(parts)


def passes(found: Runs, when: str, k: int) -> list[float]:
    """pass@k of each problem, the mean over seeds; ``when`` is ``before`` or ``after``."""
    rows = []
    for run in found:
        samples = solved(*(_sampled(run, when)[name] for name in ("right", "lengths")), run["sizes"]["min_thought"])
        rows.append([pass_at_k(len(row), sum(row), k) for row in samples])
    return [mean(column) for column in zip(*rows, strict=True)]


def _sampled(run: Record, when: str) -> Record:
    found: Record = run["before"] if when == "before" else run["stages"][-1]["after"]
    return found


def _sum(part: Runs) -> list[str]:
    one, eight = ({when: passes(part, when, k) for when in ("before", "after")} for k in (1, K))
    gains = [after - before for before, after in zip(one["before"], one["after"], strict=True)]
    right = [
        mean(ok for run in part for row in _sampled(run, when)["right"] for ok in row) for when in ("before", "after")
    ]
    lengths = [length for run in part for row in _sampled(run, "after")["lengths"] for length in row]
    config, curve = part[0]["config"], [step for run in part for step in run["stages"][-1]["logs"]]
    window, leave = config["cache_window"], int(config["evict_ratio"] * (config["cache_window"] or 0))
    evictions = "none" if window is None else f"{mean(max(0, -((window - length) // leave)) for length in lengths):.1f}"
    tokens = sum(step["tokens"] for step in curve)
    speeds = [tokens / sum(step[name] for step in curve) for name in ("rollout_seconds", "seconds")]
    held = max(step.get("cache_bytes") or step.get("pte/cache_bytes") or step["full_cache_bytes"] for step in curve)
    peaks = [run["stages"][-1]["peak_bytes"] for run in part]
    return [
        part[0]["task"],
        *head(part)[::2],
        _interval(one["before"], bootstrap),
        _interval(one["after"], bootstrap),
        _interval(gains, bootstrap, "+"),
        _interval(eight["before"], _wilson),
        _interval(eight["after"], _wilson),
        " -> ".join(f"{100 * share:.1f}" for share in right),
        f"{mean(lengths):.0f}",
        evictions,
        f"{max(step['max_log_ratio'] for step in curve):.0e}",
        f"{held / 1e6:.1f}",
        "" if None in peaks else f"{max(peaks) / 1e9:.2f}",
        " / ".join(f"{speed:.0f}" for speed in speeds),
        f"{mean(run['wall_seconds'] for run in part) / 60:.1f}",
    ]


def _interval(values: list[float], interval: Callable[[list[float]], tuple[float, float]], sign: str = "") -> str:
    low, high = interval(values)
    return f"{100 * mean(values):{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _wilson(values: list[float]) -> tuple[float, float]:
    """Exact in its variance where every value is 0 or 1, as pass@k is from k samples, and too wide otherwise.

    Unlike the bootstrap it does not collapse where all problems are solved.
    """
    return wilson(mean(values), len(values))


# Figures


def draw(folder: Path) -> None:
    """Accuracy by window and over steps of GRPO; recall by distance."""
    runs, far = (read(folder / f"{name}.jsonl", KEY) for name in ("recipes", "supervised"))
    if runs:
        draw_windows(runs, folder / "windows.png")
        draw_grpo([run for run in runs if last(run) == "grpo" and run["curve"]], folder / "grpo.png")
    if far:
        draw_distances(far, folder / "distances.png")


def draw_windows(runs: Runs, path: Path) -> None:
    """Accuracy against the size of the cache, by task."""
    from ..common.plot import figure

    tasks = list(dict.fromkeys(sorted(run["task"] for run in runs)))
    with figure(path, 1, len(tasks), (5.2 * len(tasks), 3.9), squeeze=False) as (_, axes):
        for axis, task in zip(axes[0], tasks, strict=True):
            sizes: list[int | None] = []
            for part in by_seed(runs, task=task):
                kind, ranged = last(part[0]), part[0]["settings"]["ranged"]
                if len(part[0]["evaluation"]) < 2 or kind == "supervise":
                    continue
                sizes = [row["window"] for row in part[0]["evaluation"]]
                means = [mean(whole(at(run, size))["accuracy"] for run in part) for size in sizes]
                how = f"GRPO after {KINDS[last(part[0], -2)]}" if kind == "grpo" else KINDS[kind]
                label = f"{_plain(part[0])}, {how}" + (", windows drawn" if ranged else "")
                stroke = ":" if kind == "grpo" else "-" if ranged else "--"
                places = range(len(sizes))
                axis.plot(places, means, stroke, marker="o", markersize=4, color=_colour(part[0]), label=label)
            full = mean(whole(run["base_full_cache"])["accuracy"] for run in runs if run["task"] == task)
            axis.axhline(full, color="0.5", linewidth=1)
            axis.text(0, full, "base model, full cache", color="0.4", va="bottom")
            axis.set(title=task, xlabel="window, thoughts", ylabel="right", ylim=(0, 1.08))
            axis.set_xticks(range(len(sizes)), [str(size or "all") for size in sizes])
            axis.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=7)


def draw_grpo(runs: Runs, path: Path) -> None:
    """Greedy recall over steps, each seed a line."""
    from ..common.plot import figure

    with figure(path, 1, 1, (6.4, 3.9)) as (_, axis):
        for part in by_seed(runs):
            for index, run in enumerate(part):
                *before, stage = run["settings"]["stages"]
                start = sum(other["steps"] for other in before)
                points = [(row["step"] - start, row["recall"]) for row in run["curve"] if row["step"] >= start]
                points = [(0, run["stages"][-2]["after"]["recall"]["accuracy"]), *points]
                beta = f", beta {stage['beta']:g}" if stage["beta"] else ""
                label = f"{_plain(run)}{beta} after {KINDS[before[-1]['kind']]} {before[-1]['steps']}"
                stroke = "--" if beta else ":" if before[-1]["kind"] == "distil" else "-"
                shown = None if index else label
                axis.plot(*zip(*points, strict=True), stroke, color=_colour(run), alpha=0.8, label=shown)
        axis.set(xlabel="steps of GRPO", ylabel="greedy answers right", ylim=(0, 1.02))
        axis.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=7)


def draw_distances(runs: Runs, path: Path) -> None:
    """Recall against distance in windows, longest traces: a line per arm, a faint one per seed."""
    from ..common.plot import figure

    with figure(path, 1, 1, (8.4, 4.0)) as (_, axis):
        for part in by_seed(runs):
            curves = [
                {
                    row["up_to_windows"]: row["accuracy"]
                    for row in run["evaluation"][-1]["by_distance"]
                    if row["n"] >= 30
                }
                for run in part
            ]
            places = sorted(set.intersection(*map(set, curves)))
            for curve in curves:
                values = [curve[place] for place in places]
                axis.plot(places, values, color=_colour(part[0]), linewidth=0.7, alpha=0.4)
            values = [mean(curve[place] for curve in curves) for place in places]
            axis.plot(places, values, color=_colour(part[0]), label=_plain(part[0]), marker="o", markersize=3.5)
        axis.axvline(2, color="0.6", linewidth=1, linestyle="--")
        axis.text(2, 0.4, " layers x window", color="0.4")
        axis.axhline(1 / 16, color="0.6", linewidth=1, linestyle=":")
        axis.set(xlabel="distance to the fact, in windows", ylabel="facts recalled", ylim=(0, 1.02), xlim=(0, None))
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 0.9))


def _plain(run: Record) -> str:
    return ARMS[run["arm"]][0].replace("`", "")


def _colour(run: Record) -> str:
    arm, _, policy = run["arm"].partition("-") if run["arm"] not in BASE_ARMS else (run["arm"], "", "")
    return f"C{(list(BASE_ARMS).index(arm) + (7 if policy else 0)) % 10}"


SECTIONS = (
    Section("docs/evidence.md", "recipe", recipes, "recipes.jsonl", KEY),
    Section("docs/evidence_log.md", "recipe-tuning", tuning, "tuning.jsonl", KEY),
    Section("docs/evidence_log.md", "memory", distances, "supervised.jsonl", KEY),
    Section("docs/evidence_log.md", "reasoning", sums, "sums.jsonl", KEY),
    Section("docs/lora.md", "shifted", converted, "converted.jsonl", KEY),
    Section("docs/eviction.md", "eviction", distances, "eviction.jsonl", KEY),
)
