"""Our numbers beside the paper's: prints Markdown from the records in `results/`, and 'not run' where there is none.

python examples/paper/table.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arms import ARMS, MAX_COMPLETION_LENGTH, MODELS
from records import RESULTS

NOT_RUN = "not run"
TASKS = ("math500", "olympiadbench", "minerva", "amc", "aime24", "aime25")
GPU_BYTES = 40 * 1024**3  # The paper's A100.

# As printed (arXiv 2602.16839): share of 40 GB in percent, average accuracy over the six test sets at 3072 tokens.
PAPER_MAIN = {
    ("qwen2.5-3b", "lora"): (82.8, 28.2),
    ("qwen2.5-3b", "lora_c"): (38.0, 25.6),
    ("qwen2.5-3b", "pte"): (45.3, 30.1),
    ("qwen2.5-7b", "lora"): (85.8, 38.1),
    ("qwen2.5-7b", "lora_c"): (63.1, 36.7),
    ("qwen2.5-7b", "pte"): (67.2, 39.6),
    ("r1-llama-8b", "lora"): (88.7, 34.9),
    ("r1-llama-8b", "lora_c"): (59.1, 35.1),
    ("r1-llama-8b", "pte"): (59.8, 45.6),
}
# MATH-500 of R1-Distill-Llama-8B by window. HeadKV is a policy that this package does not have.
PAPER_WINDOWS = {
    "base": {768: 34.4, 1024: 39.6, 2048: 47.8},
    "no_global": {768: 36.2, 1024: 41.0, 2048: 48.6},
    "global_only": {768: 46.8, 1024: 50.2, 2048: 54.0},
    "pte": {768: 48.4, 1024: 52.2, 2048: 55.4},
    "pte_headkv": {768: 50.7, 1024: 53.4, 2048: 55.8},
}
MAIN_ARMS = ("lora", "lora_c", "global_only", "pte")
LABELS = {**ARMS, "base": "base model", "pte_headkv": "PTE + HeadKV"}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of ``train.py`` and ``evaluation.py`` in ``folder`` that is of the whole test sets."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [record for record in records if not record.get("limit") and not record.get("data")]


def average(scores: dict[str, dict[str, float]]) -> float | None:
    """Mean pass@1 over the six test sets in percent; ``None`` unless all six were run."""
    if set(scores) != set(TASKS):
        return None
    return 100.0 * sum(scores[task]["pass_at_1"] for task in TASKS) / len(TASKS)


def cell(values: list[float], unit: str = "") -> str:
    """A figure, the mean of several runs, or that nobody has run it."""
    if not values:
        return NOT_RUN
    runs = f" ({len(values)} runs)" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{unit}{runs}"


def find(records: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The records of a run of the protocol: of no other settings, of one seed each."""
    return [
        row for row in records if not row["changed"] and all(row.get(key) == value for key, value in wanted.items())
    ]


def main_table(records: list[dict[str, Any]], window: int) -> list[str]:
    """Peak memory of training, as a share of 40 GB, and average accuracy; LoRA is evaluated on its full cache."""
    lines = [
        "| model | arm | memory, paper | memory, ours | average, paper | average, ours |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for arm in MAIN_ARMS:
            label = ARMS[arm]
            memory, accuracy = PAPER_MAIN.get((model, arm), (None, None))
            seen = None if arm == "lora" else window
            run = {"model": model, "arm": arm, "cache_window": seen}
            tested = find(records, kind="evaluation", max_new_tokens=MAX_COMPLETION_LENGTH, **run)
            trained = find(records, kind="training", **run)
            share = [100.0 * row["peak_gpu_bytes"] / GPU_BYTES for row in trained if row["peak_gpu_bytes"]]
            ours = [mean for row in tested if (mean := average(row["scores"])) is not None]
            paper = ("not given", "not given") if memory is None else (f"{memory} %", f"{accuracy}")
            lines.append(f"| {model} | {label} | {paper[0]} | {cell(share, ' %')} | {paper[1]} | {cell(ours)} |")
    return lines


def window_table(records: list[dict[str, Any]]) -> list[str]:
    """MATH-500 of R1-Distill-Llama-8B under the three windows."""
    windows = tuple(PAPER_WINDOWS["pte"])
    header = " | ".join(f"{window}, paper | {window}, ours" for window in windows)
    lines = [f"| MATH-500, r1-llama-8b | {header} |", "|---|" + "---:|" * (2 * len(windows))]
    for arm, paper in PAPER_WINDOWS.items():
        cells = []
        for window in windows:
            run = {"model": "r1-llama-8b", "arm": arm, "cache_window": window}
            found = find(records, kind="evaluation", max_new_tokens=MAX_COMPLETION_LENGTH, **run)
            scores = [100.0 * row["scores"]["math500"]["pass_at_1"] for row in found if "math500" in row["scores"]]
            cells += [f"{paper[window]}", cell(scores)]
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return lines


def every_table(records: list[dict[str, Any]]) -> list[str]:
    """Every evaluation there is, test set by test set; pass@1, and pass@16 where it was drawn."""
    runs = [record for record in records if record["kind"] == "evaluation"]
    if not runs:
        return [f"No evaluation: {NOT_RUN}."]
    head = ["model", "arm", "window", "tokens", "seed", *TASKS, "not the protocol's"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    for run in runs:
        cells = []
        for task in TASKS:
            score = run["scores"].get(task, {})
            shown = [f"{100.0 * score[name]:.1f}" for name in ("pass_at_1", "pass_at_16") if name in score]
            cells.append(" / ".join(shown) or NOT_RUN)
        window = run["cache_window"] or "full"
        changed = ", ".join(f"{name}={value}" for name, value in run["changed"].items())
        row = [run["model"], run["arm"], window, run["max_new_tokens"], run["seed"], *cells, changed]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache-window", type=int, default=768, help="window of the bounded arms in the first table")
    args = parser.parse_args(argv)
    records = read_records(args.results)
    for title, lines in (
        ("Training memory (of 40 GB) and accuracy", main_table(records, args.cache_window)),
        ("Accuracy by window", window_table(records)),
        ("Everything that was run", every_table(records)),
    ):
        print(f"**{title}**\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
