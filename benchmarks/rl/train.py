"""One arm: a supervised warm-up of the adapter (protocol `warm`), then GRPO by TRL's own `GRPOTrainer`."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from peft_pte import PTEConfig
from peft_pte.integrations.trl import PTECallback

from ..rollouts import Watch
from ..small import Training
from .model import hits
from .task import exact, make_problems, make_tokenizer, share_right, words

log = logging.getLogger(__name__)

# What makes an arm, as overrides of PTEConfig.
ARMS: dict[str, dict[str, Any]] = {
    "lora-full": {"state_update": "off", "cache_window": None},
    "lora": {"state_update": "off"},
    # Of the paper's encoder, where a setting does not say otherwise.
    "global-only": {"state_update": "frozen", "encoder_attention": "linear"},
    "pte": {"encoder_attention": "linear"},
}
# Supervised steps of the adapter under its own cache, before GRPO.
PROTOCOLS = {"straight": 0, "warm": 300}


@dataclass(frozen=True)
class Settings:
    """What is trained and how; a run is this and a seed."""

    arm: str = "pte"
    protocol: str = "warm"
    window: int = 16
    rank: int = 32
    global_tokens: int = 32
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of PTEConfig that differ from its defaults, beyond those of the arm."""
    steps: int = 16
    """Of a problem."""
    asked: int = 6
    warm_steps: int | None = None
    """`None`: as the protocol says."""
    warm_batch: int = 64
    warm_learning_rate: float = 3e-3
    grpo_steps: int = 80
    prompts: int = 16
    """Problems a GRPO step."""
    generations: int = 8
    learning_rate: float = 5e-4
    layers: int = 2
    base_seed: int = 0
    """Seed of the base model, which all runs share."""

    @property
    def supervised_steps(self) -> int:
        """Steps of the warm-up."""
        return PROTOCOLS[self.protocol] if self.warm_steps is None else self.warm_steps

    def config(self) -> PTEConfig:
        """The adapter's config.

        Raises:
            ValueError: ``arm`` is unknown.
        """
        if self.arm not in ARMS:
            raise ValueError(f"`arm` must be one of {', '.join(ARMS)}, got {self.arm!r}.")
        fields = {"r": self.rank, "num_global_tokens": self.global_tokens, "cache_window": self.window}
        return PTEConfig(**{"task_type": "CAUSAL_LM", **fields, **ARMS[self.arm], **self.overrides})


def adapt(base: PreTrainedModel, settings: Settings, seed: int) -> PeftModel:
    """``base`` with a fresh adapter of the arm."""
    torch.manual_seed(seed)
    return get_peft_model(base, settings.config())


def warm_up(model: PeftModel, settings: Settings, seed: int) -> dict[str, Any]:
    """SFT of the adapter on solutions, under the cache of the arm; returns the curve and the seconds."""
    device = model.get_base_model().device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(2000 + seed)
    steps = settings.supervised_steps
    training = Training(parameters, rate=settings.warm_learning_rate, rise=20, decay=steps, floor=0.1)
    curve: list[dict[str, float | None]] = []
    began = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        problems = make_problems(settings.warm_batch, settings.steps, settings.asked, generator)
        ids = problems.input_ids().to(device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=problems.labels().to(device))
        training.step(output.loss)
        if step % 20 == 0 or step == steps:
            tokens, answers = hits(output.logits.detach(), problems)
            evicted = ~problems.held(settings.window, evict_of(settings.window))
            curve.append(
                {
                    "step": step,
                    "loss": float(output.loss.detach()),
                    "tokens": float(tokens.float().mean()),
                    "answers": float(answers.float().mean()),
                    "evicted": float(answers[evicted].float().mean()) if bool(evicted.any()) else None,
                }
            )
            log.info("%s warm-up %s", settings.arm, curve[-1])
    return {"curve": curve, "seconds": time.perf_counter() - began}


def evict_of(window: int | None) -> int:
    """Thoughts that leave a window of ``window`` at an eviction; 0 if it is unbounded."""
    return 0 if window is None else PTEConfig(cache_window=window).tokens_per_eviction


def grpo(model: PeftModel, settings: Settings, seed: int) -> dict[str, Any]:
    """GRPO on fresh problems; returns the curve, what the cache held, speed, and the largest log ratio of all steps."""
    problems = make_problems(
        settings.prompts * settings.grpo_steps,
        settings.steps,
        settings.asked,
        torch.Generator().manual_seed(3000 + seed),
    )
    rows = [
        {"prompt": words(prompt), "solution": words(completion)}
        for prompt, completion in zip(problems.prompt_ids.tolist(), problems.completion_ids.tolist(), strict=True)
    ]
    device = model.get_base_model().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[share_right, exact],
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            callbacks=[PTECallback()],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=settings.prompts * settings.generations,
                gradient_accumulation_steps=1,
                # Nothing to save at this size, and a third of the time.
                gradient_checkpointing=False,
                num_generations=settings.generations,
                # Room for one more step than the solution has.
                max_completion_length=problems.completion_ids.shape[1] + 3,
                # `exact` is watched, not trained on.
                reward_weights=[1.0, 0.0],
                learning_rate=settings.learning_rate,
                max_steps=settings.grpo_steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=device.type == "cpu",
                bf16=False,
                disable_tqdm=True,
                seed=seed,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        watch = Watch()
        watch.attach(trainer)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    history = [row for row in trainer.state.log_history if "reward" in row]
    curve = [_curve_point(row) for row in history]
    return {
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
        "rollout_seconds": [row["rollout_seconds"] for row in watch.rows],
        "rollout_tokens": [row["tokens"] for row in watch.rows],
        # Without the first step, which warms up.
        "rollout_tokens_per_second": sum(row["tokens"] for row in watch.rows[1:])
        / sum(row["rollout_seconds"] for row in watch.rows[1:]),
        "max_log_ratio": max(row["max_log_ratio"] for row in watch.rows),
        "log_ratio_tokens": sum(row["compared"] for row in watch.rows),
        "cuda_max_memory_allocated": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "seconds": seconds,
    }


# Names of TRL's and PTE's logs, and ours; an unbounded cache evicts nothing and logs nothing of it.
_LOGGED = {
    "reward": "reward",
    "rewards/exact/mean": "exact",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "step_time": "step_seconds",
    "frac_reward_zero_std": "groups_without_signal",
    "pte/evictions_per_sequence": "evictions",
    "pte/cache_bytes": "cache_bytes",
    "pte/state_norm": "state_norm",
}


def _curve_point(row: dict[str, float]) -> dict[str, float | None]:
    return {ours: round(row[theirs], 4) if theirs in row else None for theirs, ours in _LOGGED.items()}
