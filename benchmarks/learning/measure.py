"""One task, its arms and seeds: a base model, the stages of a recipe, what is recalled under every window, with controls.

A run that is known is left out; one that died goes on from the last checkpoint of its stage (`outputs/learning`).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ..common.records import ROOT, Record, rounded
from ..common.session import Session
from .arms import ARMS, Settings, Stage, assignment
from .controls import CONTROLS
from .stages import Run, adapt, from_lora, run_stage
from .tasks import TASKS
from .tasks.task import digest

KEY = ("name", "seed", "base_seed")
CHECKPOINTS = ROOT / "outputs" / "learning"

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="permutation")
    add("--arm", nargs="+", choices=list(ARMS), default=["slots"], metavar="ARM", help=", ".join(ARMS))
    add("--stages", nargs="*", default=[], help="KIND:STEPS[,rate=R][,beta=B][,schedule=constant][,floor=F], in order")
    add("--range", action="store_true", help="draw the window of every batch")
    add("--seed", nargs="+", type=int, default=[0])
    add("--base-seed", type=int, help="of the base model, if not the seed")
    add("--probe-every", type=int, default=0, help="steps between two evaluations on the way")
    add("--set", nargs="+", type=assignment, default=[], metavar="FIELD=VALUE", help="of PTEConfig")
    add("--file", default="recipes.jsonl", help="results of one table: supervised.jsonl, eviction.jsonl, ...")
    add("--checkpoints", type=Path, default=CHECKPOINTS)


def measure(session: Session) -> Iterator[Record]:
    """A record per arm and seed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = session.options
    stages = tuple(Stage.parse(text) for text in options.stages)
    if session.quick:
        stages = tuple(Stage(**{**asdict(stage), "steps": min(stage.steps, 2)}) for stage in stages)
    for seed in options.seed:
        for arm in options.arm:
            settings = Settings(options.task, arm, stages, options.range, options.probe_every, dict(options.set))
            base_seed = seed if options.base_seed is None else options.base_seed
            if not session.results.has({"name": settings.name, "seed": seed, "base_seed": base_seed}):
                yield rounded(run(settings, seed, base_seed, options.checkpoints, session.device))


def run(settings: Settings, seed: int, base_seed: int, folder: Path | None = None, device: Any = "cpu") -> Record:
    """Everything about one run.

    Args:
        settings: What and how.
        seed: Of adapter and data.
        base_seed: Of the base model.
        folder: Where checkpoints of its stages are kept, to go on from.
        device: Of the model.
    """
    began, task = time.perf_counter(), TASKS[settings.task]
    base = task.base(base_seed).to(device)
    weights = digest(base)
    converted = bool(settings.stages) and settings.stages[0].kind == "lora"
    model = (
        from_lora(base, settings, task, settings.stages[0], seed) if converted else adapt(base, settings, task, seed)
    )
    config = model.peft_config["default"]
    trained_at = config.cache_window
    result: Record = {
        "name": settings.name,
        "task": task.name,
        "arm": settings.arm,
        "seed": seed,
        "base_seed": base_seed,
    }
    result |= {
        "settings": asdict(settings),
        "sizes": asdict(task) if is_dataclass(task) else {},
        "base_weights": weights,
    }
    result |= {"config": _config(config), "curve": [], **task.baseline(model, trained_at)}
    result |= {"trained_parameters": sum(part.numel() for part in model.parameters() if part.requires_grad)}
    done = 0

    def probe(step: int) -> None:
        found = task.evaluate(model, trained_at, task.probed)
        shares = {name: share["accuracy"] for name, share in found.items() if isinstance(share, dict)}
        result["curve"].append({"step": done + step, **shares})
        log.info("%s seed %d step %d %s", settings.name, seed, done + step, shares)

    if settings.probe_every:
        probe(0)
    result["stages"] = []
    for index, stage in enumerate(settings.stages):
        kept = None if folder is None else folder / f"{settings.name}-seed-{seed}" / str(index)
        found = run_stage(Run(model, settings, task, seed, probe, kept), stage)
        result["stages"].append(found | {"after": task.evaluate(model, trained_at, task.count)})
        done += 0 if stage.kind == "lora" else stage.steps
    windows = (trained_at,) if trained_at is None else task.probe
    result["evaluation"] = [
        {"window": window, **form, **task.evaluate(model, window, task.count, **form)}
        for window in windows
        for form in task.forms
    ]
    if config.state_update == "progressive":
        for name, control in CONTROLS.items():
            with control(model):
                result[name] = task.evaluate(model, trained_at, task.count)
    result["wall_seconds"] = time.perf_counter() - began
    return result


def _config(config: Any) -> dict[str, Any]:
    """As a record can hold it, without where on this machine the base model lies."""
    fields = {name: value for name, value in config.to_dict().items() if name != "base_model_name_or_path"}
    plain = (int, float, str, dict, list, type(None))
    return {
        name: sorted(value) if isinstance(value, set) else value if isinstance(value, plain) else str(value)
        for name, value in fields.items()
    }


def summary(record: Record) -> str:
    """A few lines for a terminal."""
    lines = [f"{record['name']} seed {record['seed']}: {record['wall_seconds']:.0f} s"]
    controls = [record[name] for name in CONTROLS if name in record]
    for row in [*(stage["after"] for stage in record["stages"]), *record["evaluation"], *controls]:
        shares = {name: share for name, share in row.items() if isinstance(share, dict) and share["n"]}
        found = " ".join(f"{name} {share['accuracy']:.3f}" for name, share in shares.items())
        rest = " ".join(f"{name} {row[name]}" for name in ("kl_by_windows", "perplexity") if name in row)
        lines.append(f"  window {row.get('window', '')} {row.get('length', '')}: {found} {rest}")
    return "\n".join(lines)
