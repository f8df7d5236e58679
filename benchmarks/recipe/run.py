"""One run: a base model of the repository, the stages of a recipe, recall under every window; a JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from ..machine import adapter_config, provenance
from ..memory.evaluate import swapped_evictions
from ..rl.run import rounded
from ..small import digest
from .notes import Notes
from .tasks import Memory, Permutation, Shifted, Task
from .train import Settings, adapt, from_lora, run_stage

RESULTS = Path(__file__).resolve().parent / "results"
TASKS: dict[str, Task] = {task.name: task for task in (Permutation(), Memory(), Shifted(), Notes())}
COUNT = {"permutation": 1024, "memory": 512, "shifted": 512, "notes": 16}
"""Sequences of an evaluation."""
PROBED = {"permutation": 512, "memory": 128, "shifted": 128, "notes": 4}

log = logging.getLogger(__name__)


def name_of(settings: Settings) -> str:
    """Task, arm, stages and what differs, as a file name."""
    parts = [settings.task, settings.arm]
    for stage in settings.stages:
        parts += [stage.kind, str(stage.steps), f"{stage.rate:g}"]
        parts += [] if stage.beta is None else [f"beta-{stage.beta:g}"]
    return "-".join([*parts, *(["range"] if settings.ranged else [])])


def run(
    settings: Settings, seed: int, command: str, folder: Path | None = None, base_seed: int | None = None
) -> dict[str, Any]:
    """Everything about one run, as it goes into its results file.

    Args:
        settings: What and how.
        seed: Of adapter and data.
        command: That repeats it.
        folder: Where checkpoints of its stages are kept, to go on from.
        base_seed: Of the base model, if it is another's.
    """
    origin, began = provenance(command), time.perf_counter()
    task = TASKS[settings.task]
    base = task.base(seed if base_seed is None else base_seed)
    result: dict[str, Any] = {
        "name": name_of(settings),
        "task": settings.task,
        "arm": settings.arm,
        "seed": seed,
        "base_seed": seed if base_seed is None else base_seed,
        "settings": dataclasses.asdict(settings),
        "base_weights": digest(base),
        "curve": [],
    }
    first = settings.stages[0]
    converted = first.kind == "lora"
    model = from_lora(base, settings, task, first, seed) if converted else adapt(base, settings, task, seed)
    with model.disable_adapter():
        result["base_full_cache"] = task.evaluate(model, None, COUNT[task.name])
    trained_at = settings.config(task).cache_window
    result["config"] = adapter_config(model)
    result["stages"], done = [], 0

    def probe(step: int) -> None:
        found = task.evaluate(model, trained_at, PROBED[task.name])
        result["curve"].append(
            {
                "step": done + step,
                **{name: share["accuracy"] for name, share in found.items() if isinstance(share, dict)},
            }
        )
        log.info("%s seed %d step %d %s", result["name"], seed, done + step, result["curve"][-1])

    if settings.probe_every:
        probe(0)
    for index, stage in enumerate(settings.stages):
        kept = None if folder is None else folder / f"{result['name']}-seed-{seed}" / str(index)
        part = run_stage(model, settings, task, stage, seed, probe, kept)
        result["stages"].append(part | {"after": task.evaluate(model, trained_at, COUNT[task.name])})
        done += 0 if stage.kind == "lora" else stage.steps
    probed = (trained_at,) if trained_at is None else task.probe
    result["evaluation"] = [{"window": window, **task.evaluate(model, window, COUNT[task.name])} for window in probed]
    if settings.config(task).state_update == "progressive":
        with swapped_evictions(model):
            result["swapped_evictions"] = task.evaluate(model, trained_at, COUNT[task.name])
    result["wall_seconds"] = time.perf_counter() - began
    return result | origin


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write ``result`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}-seed-{result['seed']}.json"
    path.write_text(json.dumps(rounded(result), allow_nan=False).replace('}, "', '},\n "') + "\n")
    return path


def summary(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [f"{result['name']} seed {result['seed']}: {result['wall_seconds']:.0f} s"]
    for row in [
        *(stage["after"] for stage in result["stages"]),
        *result["evaluation"],
        result.get("swapped_evictions", {}),
    ]:
        shares = " ".join(
            f"{name} {share['accuracy']:.3f}" for name, share in row.items() if isinstance(share, dict) and share["n"]
        )
        rest = " ".join(f"{name} {value}" for name, value in row.items() if name in ("kl_by_windows", "perplexity"))
        lines.append(f"  window {row.get('window', '')}: {shares} {rest}")
    return "\n".join(lines)
