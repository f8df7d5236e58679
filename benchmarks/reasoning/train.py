"""One arm trained with TRL's `GRPOTrainer` as it is, watched step by step."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.common import log_full_cache
from peft_pte.integrations.trl import PTECallback

from ..rollouts import Watch, peak_bytes, reset_peak
from .settings import Settings
from .task import Problems

CURVE = {
    "reward": "reward",
    "right": "right",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "clipped",
    "frac_reward_zero_std": "groups_without_spread",
    "grad_norm": "grad_norm",
    "pte/evictions_per_sequence": "evictions",
    "pte/state_norm": "state_norm",
    "pte/cache_bytes": "cache_bytes",
    "full_cache_bytes": "full_cache_bytes",
}
"""Names in the trainer's logs, and in a results file."""


class _Progress(TrainerCallback):  # type: ignore[misc]
    """A line per step."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print it."""
        if logs and "reward" in logs and self.watch.rows:
            row = self.watch.rows[-1]
            print(
                f"  step {state.global_step}/{state.max_steps} reward {logs['reward']:.2f} "
                f"length {logs['completions/mean_length']:.0f} log ratio {row['max_log_ratio']:.1e} {row['seconds']:.0f} s",
                flush=True,
            )


def make_reward(problems: Problems, model: Any, tokenizer: Any, min_thought: int) -> Any:
    """1 for a right answer after ``min_thought`` tokens or more, else 0."""

    def solved(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        problem: list[int],
        log_metric: Any,
        **kwargs: Any,
    ) -> list[float]:
        log_full_cache(log_metric, model, tokenizer, prompts, completion_ids)
        right = [
            problems.right(index, messages[-1]["content"]) for messages, index in zip(completions, problem, strict=True)
        ]
        log_metric("right", sum(right) / len(right))
        return [float(ok and len(ids) >= min_thought) for ok, ids in zip(right, completion_ids, strict=True)]

    return solved


def train(model: Any, tokenizer: Any, problems: Problems, settings: Settings, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train an adapter on ``model``.

    Returns:
        The adapted model, and what the training took: ``curve``, one entry per step, ``seconds``, ``peak_bytes``,
        ``trained_parameters``.
    """
    torch.manual_seed(seed)
    rows = [{"prompt": problems.prompt(index), "problem": index} for index in range(len(problems))]
    batch = settings.prompts * settings.generations
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            peft_config=settings.config(),
            reward_funcs=make_reward(problems, model, tokenizer, settings.min_thought),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.micro_batch,
                gradient_accumulation_steps=batch // settings.micro_batch,
                num_generations=settings.generations,
                max_completion_length=settings.max_completion,
                temperature=settings.temperature,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="constant",
                gradient_checkpointing=settings.gradient_checkpointing,
                bf16=settings.dtype == "bfloat16",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=model.device.type == "cpu",
                disable_tqdm=True,
                seed=seed,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        watch = Watch()
        watch.attach(trainer)
        if settings.bounded:
            PTECallback.attach(trainer)
        trainer.add_callback(_Progress(watch))
        device = trainer.accelerator.device
        reset_peak(device)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    curve = [
        {"step": log["step"], **{short: log[name] for name, short in CURVE.items() if name in log}, **row}
        for log, row in zip(logs, watch.rows, strict=True)
    ]
    return trainer.model, {
        "curve": curve,
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
        "trained_parameters": sum(part.numel() for part in trainer.model.parameters() if part.requires_grad),
    }
