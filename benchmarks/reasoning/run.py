"""One run: evaluate the base model under the arm's cache, train the arm, evaluate it, write a JSON."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from examples.common import load_model
from peft_pte import PTEConfig

from ..machine import ROOT, provenance
from .evaluate import SAMPLING_SEED, evaluate, per_problem, solved
from .settings import Settings, settings_for
from .task import EVALUATION_SEED, INSTRUCTION, TASKS, evaluation_problems, training_problems
from .train import train

RESULTS = Path(__file__).resolve().parent / "results"
CHECKPOINTS = ROOT / "outputs" / "reasoning"
# What the base model's evaluation depends on, apart from the cache.
EVALUATION_FIELDS = [
    "task",
    "model",
    "dtype",
    "max_completion",
    "temperature",
    "evaluation_problems",
    "samples",
    "evaluation_batch",
]
CACHE_FIELDS = ("cache_window", "evict_ratio", "eviction")


def before(settings: Settings, device: str, folder: Path = CHECKPOINTS) -> dict[str, Any]:
    """The evaluation of the base model under the arm's cache, from ``folder`` if it is there.

    A fresh adapter is the base model, so all arms under the window share one.
    """
    config = settings.config(state_update="off")
    key = {name: getattr(settings, name) for name in EVALUATION_FIELDS}
    key |= {name: getattr(config, name) for name in CACHE_FIELDS} if settings.bounded else {"cache": "full"}
    key |= {
        "seeds": [EVALUATION_SEED, SAMPLING_SEED],
        "device": device,
        "instruction": INSTRUCTION,
        "problems": TASKS[settings.task],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"before-{settings.task}-{digest}.json"
    if path.exists():
        return json.loads(path.read_text())
    model, tokenizer = load_model(settings.model, settings.dtype)
    model = model.to(device)
    model = get_peft_model(model, config) if settings.bounded else model
    found = evaluate(model, tokenizer, evaluation_problems(settings.task, settings.evaluation_problems), settings)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return found


def run(settings: Settings, seed: int, device: str, command: str, form: str, folder: Path = CHECKPOINTS) -> Any:
    """Everything about one run, as it goes into its results file."""
    start = time.perf_counter()
    origin = provenance(command)
    held_out = evaluation_problems(settings.task, settings.evaluation_problems)
    problems = training_problems(settings.task, seed, settings.training_problems, held_out)
    result: dict[str, Any] = {
        "form": form,
        "seed": seed,
        "settings": asdict(settings),
        "task_config": TASKS[settings.task],
    }
    result["before"] = before(settings, device, folder)
    _say(f"{settings.task} {settings.arm} before", result["before"], settings)
    model, tokenizer = load_model(settings.model, settings.dtype)
    adapted, result["training"] = train(model.to(device), tokenizer, problems, settings, seed)
    result["after"] = evaluate(adapted, tokenizer, held_out, settings)
    _say(f"{settings.task} {settings.arm} after", result["after"], settings)
    result["seconds"] = time.perf_counter() - start
    del adapted, model
    # The next run of this process measures its own peak.
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return result | origin


def changes(result: dict[str, Any]) -> dict[str, Any]:
    """Every setting that differs from the form's, and every field of PTEConfig from its default."""
    settings, default = result["settings"], PTEConfig()
    usual = asdict(settings_for(settings["arm"], settings["task"], result["form"]))
    changed = {name: value for name, value in settings["overrides"].items() if value != getattr(default, name)}
    return changed | {name: value for name, value in settings.items() if name != "overrides" and value != usual[name]}


def name_of(result: dict[str, Any]) -> str:
    """Form, task, arm, and what was changed."""
    parts = [] if result["form"] == "default" else [result["form"]]
    parts += [result["settings"]["task"], result["settings"]["arm"]]
    return "-".join([*parts, *(f"{name}-{Path(str(value)).name}" for name, value in changes(result).items())])


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write ``result`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(result)}-seed-{result['seed']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _say(name: str, evaluation: dict[str, Any], settings: Settings) -> None:
    values = per_problem(solved(evaluation, settings.min_thought), 1)
    lengths = [length for row in evaluation["lengths"] for length in row]
    print(
        f"{name}: pass@1 {sum(values) / len(values):.3f}, {sum(lengths) / len(lengths):.0f} tokens, "
        f"{evaluation['seconds']:.0f} s",
        flush=True,
    )
