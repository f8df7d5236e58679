"""The stages of a recipe: supervision, self-distillation (on the student's own text or on given text), GRPO."""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_pte import PTEConfig, convert_lora
from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import WindowRange

from ..rl.task import exact
from ..small import Training
from .tasks import Task

log = logging.getLogger(__name__)

ARMS: dict[str, dict[str, Any]] = {
    "slots": {"encoder_attention": "slots"},
    "slots-key_diff": {"encoder_attention": "slots", "eviction": "key_diff"},
    "softmax": {"encoder_attention": "softmax"},
    "linear": {"encoder_attention": "linear"},
    "global-only": {"encoder_attention": "slots", "state_update": "frozen"},
    "lora": {"state_update": "off"},
    "lora-key_diff": {"state_update": "off", "eviction": "key_diff"},
    "lora-full": {"state_update": "off", "cache_window": None},
}
SAVE_STEPS = (250, 20)
"""Steps between checkpoints: of a small model, of a real one."""
RISE = 20
"""Steps in which the learning rate rises; then it falls to 0 at the last step of its stage."""


@dataclass(frozen=True)
class Stage:
    """One part of a recipe, as ``distil:400`` or ``grpo:3000,beta=0.1`` on the command line."""

    kind: str
    """``supervise``, ``distil``, ``grpo``; first of all ``lora``: supervision of peft's own LoRA on the full cache, which is then converted."""
    steps: int
    rate: float
    beta: float | None = None
    """``distil``: 1 reverse KL, 0 forward, ``None``: forward on given text, reverse on what the student writes; ``grpo``: weight of the KL to the base on its full cache."""
    schedule: str = "linear"
    """Of the learning rate; ``constant`` after its rise."""

    @classmethod
    def parse(cls, text: str, rates: dict[str, float]) -> Stage:
        """From ``KIND:STEPS[,rate=R][,beta=B][,schedule=S]``; a rate that is not given is that of ``rates``.

        Raises:
            ValueError: It is something else.
        """
        head, *options = text.split(",")
        kind, _, steps = head.partition(":")
        if kind not in rates or not steps.isdigit():
            raise ValueError(
                f"A stage must be KIND:STEPS with a kind of {', '.join(rates)}, got {text!r}. Use e.g. distil:400."
            )
        given = dict(option.split("=", 1) for option in options)
        if unknown := set(given) - {"rate", "beta", "schedule"}:
            raise ValueError(
                f"A stage has rate, beta and schedule, got {', '.join(sorted(unknown))} in {text!r}. Leave it out."
            )
        beta = float(given["beta"]) if "beta" in given else None
        return cls(kind, int(steps), float(given.get("rate", rates[kind])), beta, given.get("schedule", "linear"))


@dataclass(frozen=True)
class Settings:
    """What is trained and how; a run is this and a seed."""

    task: str
    arm: str
    stages: tuple[Stage, ...]
    ranged: bool = False
    """Whether the window is drawn from the task's range for each batch."""
    rank: int = 32
    probe_every: int = 0
    """Steps between two evaluations on the way; 0: none."""
    prompts: int = 8
    """Problems of a GRPO step."""
    generations: int = 8
    overrides: dict[str, Any] = field(default_factory=dict)

    def config(self, task: Task) -> PTEConfig:
        """The adapter's config."""
        fields = {
            "r": self.rank,
            "num_global_tokens": self.rank,
            "cache_window": task.window,
            "prompt_end": task.prompt_end,
        }
        return PTEConfig(**{"task_type": "CAUSAL_LM", **fields, **ARMS[self.arm], **self.overrides})


Probe = Callable[[int], None]


def adapt(base: LlamaForCausalLM, settings: Settings, task: Task, seed: int) -> PeftModel:
    """``base`` with a fresh adapter."""
    torch.manual_seed(seed)
    return get_peft_model(base, settings.config(task))


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
    model = get_peft_model(base, lora)
    training = _training(model, stage)
    generator = torch.Generator().manual_seed(4000 + seed)
    model.train()
    for _ in range(stage.steps):
        batch = task.make(task.batch, generator)
        training.step(model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss)
    fields = {"prompt_end": task.prompt_end, "cache_window": task.window, "num_global_tokens": settings.rank}
    return convert_lora(model, **fields, **ARMS[settings.arm], **settings.overrides)


def _training(model: PeftModel, stage: Stage) -> Training:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(parameters, rate=stage.rate, rise=RISE, decay=stage.steps, floor=0.0)


def run_stage(
    model: PeftModel, settings: Settings, task: Task, stage: Stage, seed: int, probe: Probe, folder: Path | None = None
) -> dict[str, Any]:
    """Train ``model`` by one stage; returns what was logged.

    Args:
        model: The adapted model.
        settings: Of the run.
        task: What is learned.
        stage: How.
        seed: Of the data.
        probe: Called with the step where the curve is measured.
        folder: Where checkpoints are kept, to go on from; ``None``: nowhere.
    """
    began, cpu = time.perf_counter(), time.process_time()
    kinds = {"supervise": _supervise, "distil": _distil, "grpo": _grpo, "lora": _was_converted}
    logs = kinds[stage.kind](model, settings, task, stage, seed, probe, folder)
    return {
        "stage": asdict(stage),
        "logs": logs,
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def _supervise(
    model: PeftModel, settings: Settings, task: Task, stage: Stage, seed: int, probe: Probe, folder: Path | None
) -> list[dict[str, Any]]:
    training = _training(model, stage)
    generator = torch.Generator().manual_seed(2000 + seed)
    config = model.peft_config[model.active_adapter]
    draws, logs = random.Random(seed), []
    for step in range(1, stage.steps + 1):
        model.train()
        if settings.ranged:
            config.cache_window = draws.choice(task.windows)
        batch = task.make(task.batch, generator)
        loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        training.step(loss)
        config.cache_window = task.window
        if step % 50 == 0:
            logs.append({"step": step, "loss": float(loss.detach())})
        if settings.probe_every and step % settings.probe_every == 0:
            probe(step)
    return logs


def _was_converted(*_: Any) -> list[dict[str, Any]]:
    """A ``lora`` stage was run before the adapter was there: :func:`from_lora`."""
    return []


class _Probe(TrainerCallback):  # type: ignore[misc]
    def __init__(self, probe: Probe, every: int) -> None:
        self.probe, self.every = probe, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            random_state, training = torch.get_rng_state(), kwargs["model"].training
            self.probe(state.global_step)
            kwargs["model"].train(training)
            torch.set_rng_state(random_state)


def _arguments(stage: Stage, seed: int, folder: str, batch: int, micro_batch: int = 128) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": min(batch, micro_batch),
        "gradient_accumulation_steps": max(batch // micro_batch, 1),
        # At the small size nothing to save, and a third of the time.
        "gradient_checkpointing": False,
        "learning_rate": stage.rate,
        "warmup_steps": RISE,
        "lr_scheduler_type": "linear" if stage.schedule == "linear" else "constant_with_warmup",
        "max_steps": stage.steps,
        "logging_steps": 50 if batch > 8 else 5,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS[batch <= 8],
        "save_total_limit": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": seed,
    }


def _train(trainer: Any, settings: Settings, task: Task, probe: Probe, folder: Path | None) -> list[dict[str, Any]]:
    # The range before the probe, which then finds the config with its own window.
    if settings.ranged:
        WindowRange.attach(trainer, task.windows)
    trainer.add_callback(_Probe(probe, settings.probe_every))
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    kept = folder is not None and any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=kept or None)
    return [
        {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def _distil(
    model: PeftModel, settings: Settings, task: Task, stage: Stage, seed: int, probe: Probe, folder: Path | None
) -> list[dict[str, Any]]:
    data = task.data(stage.steps * task.batch, torch.Generator().manual_seed(2000 + seed))
    sample = task.make(1, torch.Generator().manual_seed(0))
    completion = sample.input_ids.shape[1] - sample.prompt
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SelfDistillationTrainer(
            model=model,
            train_dataset=data,
            processing_class=task.tokenizer(),
            args=SelfDistillationConfig(
                **_arguments(stage, seed, str(folder or scratch), task.batch, task.micro_batch),
                beta=(0.0 if task.given else 1.0) if stage.beta is None else stage.beta,
                lmbda=0.0 if task.given else 1.0,
                max_completion_length=completion,
            ),
        )
        return _train(trainer, settings, task, probe, folder)


def _grpo(
    model: PeftModel, settings: Settings, task: Task, stage: Stage, seed: int, probe: Probe, folder: Path | None
) -> list[dict[str, Any]]:
    data = task.data(stage.steps * settings.prompts, torch.Generator().manual_seed(3000 + seed))
    sample = task.make(1, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=exact,
            train_dataset=data.remove_columns("completion"),
            processing_class=task.tokenizer(),
            args=GRPOConfig(
                **_arguments(stage, seed, str(folder or scratch), settings.prompts * settings.generations),
                num_generations=settings.generations,
                # Room for a token more than the solution has.
                max_completion_length=sample.input_ids.shape[1] - sample.prompt + 1,
                beta=stage.beta or 0.0,
            ),
        )
        return _train(trainer, settings, task, probe, folder)
