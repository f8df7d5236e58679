"""Our numbers beside the paper's: prints Markdown from the records in `results/`, and 'not run' where there is none.

python examples/paper/table.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arms import ARMS, MAX_COMPLETION_LENGTH, MODELS

HERE = Path(__file__).resolve().parent
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
# MATH-500 of R1-Distill-Llama-8B by window. Its rows "no global tokens" and "PTE + HeadKV" are no arms of this protocol.
PAPER_WINDOWS = {
    "base": {768: 34.4, 1024: 39.6, 2048: 47.8},
    "global_only": {768: 46.8, 1024: 50.2, 2048: 54.0},
    "pte": {768: 48.4, 1024: 52.2, 2048: 55.4},
}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of ``train.py`` and ``evaluation.py`` in ``folder`` that is of the whole test sets."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [record for record in records if not record.get("limit") and not record.get("data")]


def average(scores: dict[str, dict[str, float]]) -> float | None:
    """Mean pass@1 over the six test sets in percent; ``None`` unless all six were run."""
    if set(scores) != set(TASKS):
        return None
    return 100.0 * sum(scores[task]["pass_at_1"] for task in TASKS) / len(TASKS)


def cell(value: float | None, unit: str = "") -> str:
    """A figure, or that nobody has run it."""
    return NOT_RUN if value is None else f"{value:.1f}{unit}"


def find(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The record of a run, if there is one."""
    return next((row for row in records if all(row.get(key) == value for key, value in wanted.items())), None)


def main_table(records: list[dict[str, Any]], window: int) -> list[str]:
    """Peak memory of training, as a share of 40 GB, and average accuracy; LoRA is evaluated on its full cache."""
    lines = [
        "| model | arm | memory, paper | memory, ours | average, paper | average, ours |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for arm, label in ARMS.items():
            memory, accuracy = PAPER_MAIN.get((model, arm), (None, None))
            seen = None if arm == "lora" else window
            run = {"model": model, "arm": arm, "cache_window": seen}
            tested = find(records, kind="evaluation", max_new_tokens=MAX_COMPLETION_LENGTH, **run)
            trained = find(records, kind="training", **run)
            peak = trained["peak_gpu_bytes"] if trained else None
            share = None if peak is None else 100.0 * peak / GPU_BYTES
            ours = average(tested["scores"]) if tested else None
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
            record = find(records, kind="evaluation", max_new_tokens=MAX_COMPLETION_LENGTH, **run)
            score = record["scores"].get("math500") if record else None
            cells += [f"{paper[window]}", cell(100.0 * score["pass_at_1"] if score else None)]
        lines.append(f"| {ARMS.get(arm, 'base model')} | {' | '.join(cells)} |")
    return lines


def every_table(records: list[dict[str, Any]]) -> list[str]:
    """Every evaluation there is, test set by test set; pass@1, and pass@16 where it was drawn."""
    runs = [record for record in records if record["kind"] == "evaluation"]
    if not runs:
        return [f"No evaluation: {NOT_RUN}."]
    lines = [f"| model | arm | window | tokens | {' | '.join(TASKS)} |", "|---|---|---:|---:|" + "---:|" * len(TASKS)]
    for run in runs:
        cells = []
        for task in TASKS:
            score = run["scores"].get(task, {})
            shown = [cell(100.0 * score[name]) for name in ("pass_at_1", "pass_at_16") if name in score]
            cells.append(" / ".join(shown) or NOT_RUN)
        window = run["cache_window"] or "full"
        lines.append(f"| {run['model']} | {run['arm']} | {window} | {run['max_new_tokens']} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
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
