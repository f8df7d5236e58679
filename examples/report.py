"""How the examples train and what they leave behind: progress, checkpoints, `report.json` and `report.png`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import peft
import torch
import transformers
import trl
from common import processes
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import peft_pte
from peft_pte.integrations.trl import PTECallback

mpl.use("Agg")
from matplotlib import pyplot as plt


def prepare_output(folder: Path, resume: bool) -> None:
    """Keep the checkpoints of an interrupted run for ``--resume``; those of a finished run make room for a new one."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if resume or not processes().is_main_process:
        return
    if checkpoints and not (folder / "report.json").exists():
        raise ValueError(
            f"`--output-dir` must not hold an unfinished run, got {folder} with {checkpoints[-1].name}. Use --resume to "
            "continue it, another folder, or delete it."
        )
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    (folder / "report.json").unlink(missing_ok=True)


class Progress(TrainerCallback):
    """One line per log, of the figures named, and how long the rest will take.

    Args:
        expected: Seconds of a step where that was measured, to be said before the first one.
        figures: By name in the logs, how they are shown.
    """

    def __init__(self, expected: float | None, **figures: str) -> None:
        self.expected, self.figures = expected, figures
        self.start, self.first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how long it will take, as far as is known."""
        self.start, self.first = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            steps = state.max_steps - state.global_step
            known = "How long they take is said after the first."
            if self.expected is not None:
                known = f"About {duration(steps * self.expected)} on two free CPU cores."
            print(f"{steps} steps. {known}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the line, on the main process."""
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = (time.perf_counter() - self.start) / max(1, state.global_step - self.first)
            shown = [label.format(logs[name]) for name, label in self.figures.items() if name in logs]
            left = duration(seconds * (state.max_steps - state.global_step))
            print(f"step {state.global_step:>3}/{state.max_steps}  {'  '.join(shown)}  {left} left", flush=True)


def duration(seconds: float) -> str:
    """Rounded to what matters to who waits."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def train(trainer: Any, progress: dict[str, str], resume: bool, expected: float | None = None) -> float:
    """Train with PTE's figures in every log and one line of progress per log; save the adapter; return the seconds.

    Args:
        trainer: Of TRL.
        progress: By name in the logs, how figures are shown.
        resume: Whether to go on from the last checkpoint.
        expected: Seconds of a step on two free CPU cores, where that was measured.
    """
    PTECallback.attach(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(expected, **progress))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    return time.perf_counter() - start


def write_report(
    folder: Path,
    title: str,
    args: argparse.Namespace,
    history: list[dict[str, Any]],
    panels: list[tuple[str, list[tuple[str, str | None]], float]],
    **figures: Any,
) -> None:
    """``report.json`` with everything, and ``report.png`` with one panel per ``(title, [(figure, label)], factor)``."""
    rows = [row for row in history if "loss" in row]
    report = {
        "title": title,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (peft_pte, torch, transformers, peft, trl)},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "processes": processes().num_processes,
        **figures,
        "history": rows,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    drawing, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (name, curves, factor) in zip(axes[0], panels, strict=True):
        for index, (figure, label) in enumerate(curves):
            points = [(row["step"], row[figure] * factor) for row in rows if row.get(figure) is not None]
            draw_curve(axis, points, label, f"C{index}")
        axis.margins(y=0.12)
        axis.autoscale()
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="best")
    drawing.suptitle(title)
    drawing.savefig(folder / "report.png", dpi=130)
    plt.close(drawing)


def draw_curve(axis: Any, points: list[tuple[int, float]], label: str | None, color: str) -> None:
    """One curve; without a label it is a noisy one, and drawn as dots with the mean of the last steps."""
    steps, values = zip(*points, strict=True)
    span = max(2, len(values) // 6) if label is None else 1
    if label is None:
        axis.plot(steps, values, "o", color=color, alpha=0.35, markersize=4)
        label = f"mean of the last {span} steps"
    means = [sum(part) / len(part) for part in (values[max(0, i + 1 - span) : i + 1] for i in range(len(values)))]
    axis.plot(steps, means, color=color, linewidth=2.2, label=label)
