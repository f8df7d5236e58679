"""Adaptation of one arm under the window: the frozen base model, AdamW on the adapter, answers alone in the loss."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_pte import PTEConfig, head_importance

from ..small import Training
from .model import recall
from .task import PROMPT, Traces, make_traces
from .variants import install, share_state

log = logging.getLogger(__name__)

# What makes an arm, as overrides of PTEConfig. `pte` is its defaults with the paper's encoder; `base` is the model itself with its full cache: nothing is trained.
ARMS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "pte": {"encoder_attention": "linear"},
    "pte-slots": {"encoder_attention": "slots"},
    "pte-value": {"encoder_attention": "linear", "state_address": "value"},
    "global-only": {"encoder_attention": "linear", "state_update": "frozen"},
    "lora": {"state_update": "off"},
    "lora-detached": {"state_update": "off", "backprop_through_cache": False},
}


@dataclass(frozen=True)
class Settings:
    """What is trained and how; a run is this and a seed."""

    arm: str = "pte"
    window: int = 32
    evict_ratio: float = 0.25
    rank: int = 32
    global_tokens: int = 32
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of PTEConfig that differ from its defaults, beyond those of the arm."""
    variant: str | None = None
    """A change to the method itself, by its name in `variants.VARIANTS`."""
    shared_layer: int | None = None
    """The layer whose state all layers read; ``None``: each its own."""
    stages: tuple[tuple[int, int], ...] = ((96, 400), (162, 150))
    """(thoughts, steps), short traces before long ones."""
    detached_steps: int = 0
    """Steps at the start in which gradients do not flow through cached keys and values."""
    batch: int = 64
    learning_rate: float = 3e-3
    loss_on: str = "answers"
    """`answers`, or `all`: every token of the trace after the first."""
    layers: int = 2

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(steps for _, steps in self.stages)

    @property
    def evict(self) -> int:
        """Thoughts that leave at an eviction."""
        return self.config().tokens_per_eviction

    def config(self) -> PTEConfig:
        """The adapter's config.

        Raises:
            ValueError: ``arm`` is unknown.
        """
        if self.arm not in ARMS:
            raise ValueError(f"`arm` must be one of {', '.join(ARMS)}, got {self.arm!r}.")
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "num_global_tokens": self.global_tokens,
            "cache_window": self.window,
            "evict_ratio": self.evict_ratio,
        }
        return PTEConfig(**{**fields, **(ARMS[self.arm] or {}), **self.overrides})


def labels_of(traces: Traces, loss_on: str) -> torch.Tensor:
    """``[B, N]``.

    Raises:
        ValueError: ``loss_on`` is unknown.
    """
    if loss_on == "answers":
        return traces.answers
    if loss_on == "all":
        return traces.input_ids
    raise ValueError(f"`loss_on` must be 'answers' or 'all', got {loss_on!r}.")


def train(base: PreTrainedModel, settings: Settings, seed: int) -> tuple[PeftModel, dict[str, Any]]:
    """Adapt ``base``; returns the adapted model and what the training took (``curve``, seconds of wall and CPU)."""
    torch.manual_seed(seed)
    device = base.device
    config = settings.config()
    model = get_peft_model(base, config).train()
    if settings.variant is not None:
        install(model, settings.variant, config)
    if settings.shared_layer is not None:
        share_state(model, settings.shared_layer)
    exact = config.backprop_through_cache
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(2000 + seed)
    training = Training(parameters, rate=settings.learning_rate, rise=20, decay=settings.steps, floor=0.05)
    curve: list[dict[str, float | None]] = []
    wall, cpu, step = time.perf_counter(), time.process_time(), 0
    for length, steps in settings.stages:
        for _ in range(steps):
            if settings.detached_steps:
                active = model.peft_config[model.active_adapter]
                active.backprop_through_cache = exact and step >= settings.detached_steps
            traces = make_traces(settings.batch, length, generator).to(device)
            output = model(input_ids=traces.input_ids, labels=labels_of(traces, settings.loss_on), prompt_length=PROMPT)
            training.step(output.loss)
            step += 1
            if step % 20 == 0 or step == settings.steps:
                far = traces.distance > settings.layers * settings.window
                right = recall(output.logits.detach(), traces)
                curve.append(
                    {
                        "step": step,
                        "length": length,
                        "loss": float(output.loss.detach()),
                        "recall": float(right.float().mean()),
                        "beyond_relay": float(right[far].float().mean()) if bool(far.any()) else None,
                    }
                )
                if step % 60 == 0:
                    log.info("%s step %d %s", settings.arm, step, curve[-1])
    model.eval()
    return model, {
        "curve": curve,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def with_importance(settings: Settings, base: PreTrainedModel) -> Settings:
    """``settings``, where windows are shared out with how far back the heads of ``base`` look on traces of the longest stage."""
    if settings.overrides.get("eviction") != "head_budget":
        return settings
    traces = make_traces(32, max(length for length, _ in settings.stages), torch.Generator().manual_seed(3000))
    measured = head_importance(
        base,
        traces.input_ids.to(base.device),
        cache_window=settings.window,
        evict_ratio=settings.evict_ratio,
        prompt_length=PROMPT,
    )
    options = {"importance": [[round(share, 4) for share in layer] for layer in measured]}
    return replace(settings, overrides={**settings.overrides, "eviction_options": options})


def settings_dict(settings: Settings) -> dict[str, Any]:
    """For a results file."""
    return dataclasses.asdict(settings)
