"""The stages of a recipe: supervision, self-distillation (on the student's own text or on given text), GRPO, a LoRA that is converted."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_pte import convert_lora, head_importance
from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import PTECallback, WindowRange

from .arms import ARMS, Settings, Stage
from .tasks import Task
from .tasks.task import Training
from .watch import Watch, peak_bytes, reset_peak

RISE = 20
"""Steps in which the learning rate rises; then it falls to its floor at the last step of its stage."""
MICRO_BATCH = 128
"""Completions of GRPO that are scored together at most."""

Probe = Callable[[int], None]
Found = dict[str, Any]


@dataclass
class Run:
    """What a stage is given: everything about its run."""

    model: PeftModel
    settings: Settings
    task: Task
    seed: int
    probe: Probe
    """Called with the step where the curve is measured."""
    folder: Path | None = None
    """Where checkpoints of the stage are kept, to go on from; ``None``: nowhere."""


def adapt(base: LlamaForCausalLM, settings: Settings, task: Task, seed: int) -> PeftModel:
    """``base`` with a fresh adapter; where windows are shared out, by how far back its heads look."""
    options: dict[str, Any] = {}
    if {**ARMS[settings.arm][1], **settings.overrides}.get("eviction") == "head_budget":
        seen = task.make(32, torch.Generator().manual_seed(3000), 1.0).to(base.device)
        measured = head_importance(base, seen.input_ids, cache_window=task.window, prompt_length=seen.prompt)
        importance = [[round(share, 4) for share in layer] for layer in measured]
        options = {"eviction_options": {"importance": importance}}
    torch.manual_seed(seed)
    return get_peft_model(base, settings.config(task, **options))


def from_lora(base: LlamaForCausalLM, settings: Settings, task: Task, stage: Stage, seed: int) -> PeftModel:
    """``base`` with a LoRA of the arm's rank and linears, supervised on the full cache, converted into the arm."""
    torch.manual_seed(seed)
    config = settings.config(task)
    # peft's "all-linear" is what PTE takes by itself.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=int(config.scale(config.r) * config.r),
        target_modules="all-linear",
    )
    model = get_peft_model(base, lora).train()
    training = Training(model, stage.rate, RISE, stage.steps, stage.floor)
    generator = torch.Generator().manual_seed(4000 + seed)
    for step in range(stage.steps):
        batch = task.make(task.batch, generator, step / stage.steps).to(model.device)
        training.step(model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss)
    fields = {"prompt_end": task.prompt_end, "cache_window": task.window, "num_global_tokens": task.rank}
    return convert_lora(model, **fields, **ARMS[settings.arm][1], **settings.overrides)


def run_stage(run: Run, stage: Stage) -> Found:
    """Train by one stage; returns what was logged."""
    began, cpu = time.perf_counter(), time.process_time()
    # A `lora` stage was run before the adapter was there: `from_lora`.
    found = {"logs": []} if stage.kind == "lora" else _KINDS[stage.kind](run, stage)
    seconds = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {"stage": asdict(stage), **found, **seconds}


def _supervise(run: Run, stage: Stage) -> Found:
    model, task = run.model, run.task
    training = Training(model, stage.rate, RISE, stage.steps, stage.floor)
    generator = torch.Generator().manual_seed(2000 + run.seed)
    config = model.peft_config[model.active_adapter]
    draws, logs, window = random.Random(run.seed), [], config.cache_window
    for step in range(1, stage.steps + 1):
        model.train()
        if run.settings.ranged:
            config.cache_window = draws.choice(task.windows)
        batch = task.make(task.batch, generator, (step - 1) / stage.steps).to(model.device)
        loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        training.step(loss)
        config.cache_window = window
        if step % 50 == 0:
            logs.append({"step": step, "loss": float(loss.detach())})
        if run.settings.probe_every and step % run.settings.probe_every == 0:
            run.probe(step)
    return {"logs": logs}


def _distil(run: Run, stage: Stage) -> Found:
    task = run.task
    data = task.data(stage.steps * task.batch, torch.Generator().manual_seed(2000 + run.seed))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SelfDistillationTrainer(
            model=run.model,
            train_dataset=data,
            processing_class=task.tokenizer(),
            args=SelfDistillationConfig(
                **_arguments(run, stage, scratch, task.batch, task.micro_batch),
                beta=(0.0 if task.given else 1.0) if stage.beta is None else stage.beta,
                lmbda=0.0 if task.given else 1.0,
                max_completion_length=task.completion(),
            ),
        )
        return {"logs": _train(run, trainer)}


def _grpo(run: Run, stage: Stage) -> Found:
    task, device = run.task, run.model.device
    data = task.data(stage.steps * task.prompts, torch.Generator().manual_seed(3000 + run.seed))
    batch = task.prompts * task.generations
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=run.model,
            reward_funcs=task.reward(run.model),
            train_dataset=data.remove_columns([name for name in ("completion",) if name in data.column_names]),
            processing_class=task.tokenizer(),
            args=GRPOConfig(
                **_arguments(run, stage, scratch, batch, min(MICRO_BATCH, task.score_together or batch)),
                num_generations=task.generations,
                # Room for a token more than the solution has.
                max_completion_length=task.completion() + 1,
                temperature=task.temperature,
                beta=stage.beta or 0.0,
            ),
        )
        watch = Watch()
        watch.attach(trainer)
        PTECallback.attach(trainer)
        reset_peak(device)
        logs = _train(run, trainer)
    if task.log_every == 1:
        logs = [{**row, **watched} for row, watched in zip(logs, watch.rows, strict=True)]
    largest = max((row["max_log_ratio"] for row in watch.rows), default=None)
    compared = sum(row["compared"] for row in watch.rows)
    return {"logs": logs, "max_log_ratio": largest, "compared": compared, "peak_bytes": peak_bytes(device)}


_KINDS: dict[str, Callable[[Run, Stage], Found]] = {"supervise": _supervise, "distil": _distil, "grpo": _grpo}


def _arguments(run: Run, stage: Stage, scratch: str, batch: int, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(run.folder or scratch),
        "per_device_train_batch_size": min(batch, micro_batch),
        "gradient_accumulation_steps": max(batch // micro_batch, 1),
        # At the small size nothing to save, and a third of the time.
        "gradient_checkpointing": False,
        "learning_rate": stage.rate,
        "warmup_steps": RISE if run.task.log_every > 1 else 0,
        "lr_scheduler_type": "linear" if stage.schedule == "linear" else "constant_with_warmup",
        "max_steps": stage.steps,
        "logging_steps": run.task.log_every,
        "save_strategy": "steps",
        "save_steps": run.task.save_every,
        "save_total_limit": 1,
        "report_to": [],
        "use_cpu": run.model.device.type == "cpu",
        "bf16": False,
        "disable_tqdm": True,
        "seed": run.seed,
    }


class _Probe(TrainerCallback):  # type: ignore[misc]
    def __init__(self, probe: Probe, every: int) -> None:
        self.probe, self.every = probe, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            random_state, training = torch.get_rng_state(), kwargs["model"].training
            self.probe(state.global_step)
            kwargs["model"].train(training)
            torch.set_rng_state(random_state)


def _train(run: Run, trainer: Any) -> list[dict[str, Any]]:
    # The range before the probe, which then finds the config with its own window.
    if run.settings.ranged:
        WindowRange.attach(trainer, run.task.windows)
    trainer.add_callback(_Probe(run.probe, run.settings.probe_every))
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    kept = run.folder is not None and any(run.folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=kept or None)
    return [
        {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for row in trainer.state.log_history
        if "loss" in row
    ]
