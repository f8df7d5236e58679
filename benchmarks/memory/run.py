"""One run: pretrain (or load) the base model of a seed, adapt one arm, evaluate it with its controls, write a JSON."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..machine import adapter_config, provenance
from ..small import digest
from .evaluate import evaluate, frozen_state, swapped_evictions
from .model import base_model
from .train import Settings, settings_dict, train, with_importance
from .variants import VARIANTS

RESULTS = Path(__file__).resolve().parent / "results"
EVALUATION_LENGTHS = (162, 240)
EVALUATION_TRACES = 512
SHORT_STAGES = ((96, 400),)

EVICTIONS = ("random", "key_diff", "attention", "head_budget")

# One change each against an arm: fields of `Settings`.
ABLATIONS: dict[str, dict[str, Any]] = {
    "detached": {"overrides": {"backprop_through_cache": False}},
    "detached-then-exact": {"detached_steps": 200},
    "gain-0.1": {"overrides": {"update_gain": 0.1}},
    "gain-0.3": {"overrides": {"update_gain": 0.3}},
    "gain-3": {"overrides": {"update_gain": 3.0}},
    "gain-10": {"overrides": {"update_gain": 10.0}},
    "softmax": {"overrides": {"encoder_attention": "softmax"}},
    "slots": {"overrides": {"encoder_attention": "slots"}},
    "rank-16": {"rank": 16, "global_tokens": 16},
    "queries-64": {"global_tokens": 64},
    "no-global": {"global_tokens": 0},
    "attention-only": {"overrides": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
    "query-value-only": {"overrides": {"target_modules": ["q_proj", "v_proj"]}},
    "rotated-keys": {"overrides": {"key_rotation": "kept"}},
    "shared-first": {"shared_layer": 0},
    "all-tokens": {"loss_on": "all"},
    "long-only": {"stages": ((162, 400),)},
    "twice-as-long": {"stages": ((96, 800), (162, 300))},
} | {name: {"variant": name} for name in VARIANTS}
ABLATIONS |= {f"evict-{name}": {"overrides": {"eviction": name}} for name in EVICTIONS}

log = logging.getLogger(__name__)


def settings_for(arm: str, ablation: str | None = None, short: bool = False) -> Settings:
    """The settings of an arm, changed by an ablation, shortened if asked.

    Raises:
        ValueError: ``ablation`` is unknown.
    """
    settings = Settings(arm=arm)
    if ablation is not None:
        if ablation not in ABLATIONS:
            raise ValueError(f"`ablation` must be one of {', '.join(ABLATIONS)}, got {ablation!r}.")
        settings = replace(settings, **ABLATIONS[ablation])
    return replace(settings, stages=SHORT_STAGES) if short else settings


def run(settings: Settings, seed: int, device: str, command: str, name: str, short: bool = False) -> dict[str, Any]:
    """Everything about one run, as it goes into its results file."""
    wall, cpu = time.perf_counter(), time.process_time()
    origin = provenance(command)
    base = base_model(seed, settings.layers, device)
    settings = with_importance(settings, base)
    result: dict[str, Any] = {"name": name, "arm": settings.arm, "seed": seed, "settings": settings_dict(settings)}
    result["base_weights"] = digest(base)
    result["steps"] = settings.steps if settings.arm != "base" else 0
    model: Any = base
    if settings.arm != "base":
        model, result["training"] = train(base, settings, seed)
        result["config"] = adapter_config(model)
    measure = (EVALUATION_TRACES, settings.window, settings.evict, settings.layers)
    lengths = (96,) if short else EVALUATION_LENGTHS
    result["evaluation"] = [evaluate(model, length, *measure) for length in lengths]
    if settings.config().state_update == "progressive" and settings.arm != "base":
        with swapped_evictions(model):
            result["swapped_evictions"] = evaluate(model, lengths[0], *measure)
        with frozen_state(model):
            result["frozen_state"] = evaluate(model, lengths[0], *measure)
    result["wall_seconds"] = time.perf_counter() - wall
    result["cpu_seconds"] = time.process_time() - cpu
    return result | origin


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write ``result`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}-seed-{result['seed']}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def summary(result: dict[str, Any]) -> str:
    """One line for a terminal."""
    parts = [f"{result['name']} seed {result['seed']}: {result['wall_seconds']:.0f} s"]
    for evaluation in [
        *result["evaluation"],
        *(result[c] for c in ("swapped_evictions", "frozen_state") if c in result),
    ]:
        buckets = evaluation["buckets"]
        shares = " ".join(f"{name} {share['accuracy']:.3f}" for name, share in buckets.items() if share["n"])
        parts.append(f"  T={evaluation['length']}: {shares} running {evaluation['running']['accuracy']:.3f}")
    return "\n".join(parts)
