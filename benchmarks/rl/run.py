"""One run: warm up and train one arm, evaluate it under every window, write a JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from ..machine import ROOT, adapter_config, provenance
from ..memory.evaluate import swapped_evictions
from ..small import digest
from .evaluate import evaluate
from .model import solved
from .train import Settings, adapt, evict_of, grpo, warm_up

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = ROOT / "outputs" / "rl-quick"
WINDOWS: tuple[int | None, ...] = (16, 24, 32, None)
EVALUATION_PROBLEMS = 512
QUICK: dict[str, Any] = {"warm_steps": 4, "warm_batch": 8, "grpo_steps": 3, "prompts": 2, "generations": 4}
QUICK_PROBLEMS = 16

log = logging.getLogger(__name__)


def settings_for(arm: str, protocol: str, quick: bool = False, **changes: Any) -> Settings:
    """The settings of an arm under a protocol, shortened if asked."""
    settings = Settings(arm=arm, protocol=protocol)
    if quick:
        short = {name: value for name, value in QUICK.items() if name != "warm_steps" or protocol == "warm"}
        settings = replace(settings, **short)
    return replace(settings, **changes)


def name_of(settings: Settings, suffix: str | None = None) -> str:
    """The name of a run: arm, protocol, and what differs from the library's defaults."""
    return "-".join(part for part in (settings.arm, settings.protocol, suffix) if part)


def run(
    base: LlamaForCausalLM, settings: Settings, seed: int, command: str, name: str, quick: bool = False
) -> dict[str, Any]:
    """Everything about one run, as it goes into its results file."""
    origin = provenance(command)
    began = time.perf_counter()
    result: dict[str, Any] = {"name": name, "arm": settings.arm, "protocol": settings.protocol, "seed": seed}
    result["settings"] = dataclasses.asdict(settings)
    result["base_weights"] = digest(base)
    result["base_greedy_full_cache"] = solved(base, settings.base_seed)
    model = adapt(base, settings, seed)
    result["config"] = adapter_config(model)
    result["trained_parameters"] = sum(part.numel() for part in model.parameters() if part.requires_grad)
    batch = QUICK_PROBLEMS if quick else EVALUATION_PROBLEMS

    def measure(window: int | None, sample: bool) -> dict[str, Any]:
        return evaluate(model, window, evict_of(window), settings.steps, settings.asked, batch, sample, settings.layers)

    trained_at = settings.config().cache_window
    if settings.supervised_steps:
        result["warm_up"] = warm_up(model, settings, seed)
    # Greedy as well: rewards of samples rise, too, where a policy only becomes surer of what it knew.
    result["before_grpo"] = [measure(trained_at, sample) for sample in (True, False)]
    result["grpo"] = grpo(model, settings, seed)
    result["evaluation"] = [measure(window, sample) for window in WINDOWS for sample in (True, False)]
    if settings.config().state_update == "progressive":
        with swapped_evictions(model):
            result["swapped_evictions"] = measure(trained_at, True)
    result["wall_seconds"] = time.perf_counter() - began
    return result | origin


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write ``result`` to ``folder``, one line per number list."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}-seed-{result['seed']}.json"
    path.write_text(json.dumps(rounded(result), allow_nan=False).replace('}, "', '},\n "') + "\n")
    return path


def summary(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    curve, rollout = result["grpo"]["curve"]["reward"], result["grpo"]
    lines = [
        f"{result['name']} seed {result['seed']}: {result['wall_seconds']:.0f} s, reward {result['before_grpo'][0]['reward']['accuracy']:.3f} "
        f"before GRPO, {curve[0]:.3f} -> {curve[-1]:.3f}, {rollout['rollout_tokens_per_second']:.0f} tokens/s, "
        f"max |log ratio| {rollout['max_log_ratio']:.1e}"
    ]
    swapped = [result["swapped_evictions"]] if "swapped_evictions" in result else []
    for row in [*result["before_grpo"], *result["evaluation"], *swapped]:
        shown = [key for key in ("reward", "exact", "in_window", "evicted") if row[key]["n"]]
        shares = " ".join(f"{key} {row[key]['accuracy']:.3f}" for key in shown)
        lines.append(f"  window {row['window']} {row['decoding']}: {shares}")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """`value` with five digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
