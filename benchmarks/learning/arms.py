"""What is trained: arms, the stages of a recipe, and the settings that name a run."""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass, field
from typing import Any

from peft_pte import PTEConfig

from .tasks.task import Task

OFF: dict[str, Any] = {"state_update": "off"}
FULL: dict[str, Any] = {**OFF, "cache_window": None}
BASE_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base model, full cache", FULL),
    "lora-full": ("LoRA, full cache", FULL),
    "lora": ("LoRA_c", OFF),
    "lora-detached": ("LoRA_c, detached", {**OFF, "backprop_through_cache": False}),
    "global-only": ("Global-Only", {"encoder_attention": "slots", "state_update": "frozen"}),
    "linear": ("PTE, linear", {"encoder_attention": "linear"}),
    "linear-value": ("PTE, linear, by value", {"encoder_attention": "linear", "state_address": "value"}),
    "softmax": ("PTE, softmax", {"encoder_attention": "softmax"}),
    "slots": ("PTE, slots", {"encoder_attention": "slots"}),
}
"""By name how tables call it, and the fields of `PTEConfig`. `base` is not trained."""
POLICIES = ("random", "key_diff", "attention", "head_budget")
ARMS: dict[str, tuple[str, dict[str, Any]]] = {}
for _arm, (_name, _fields) in BASE_ARMS.items():
    ARMS[_arm] = _name, _fields
    if _arm in ("lora", "slots"):
        ARMS |= {f"{_arm}-{policy}": (f"{_name}, `{policy}`", {**_fields, "eviction": policy}) for policy in POLICIES}
RATES = {"supervise": 6e-3, "distil": 6e-3, "grpo": 3e-4, "lora": 3e-3}
"""Learning rates of stages that give none."""


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
    floor: float = 0.0
    """``supervise``: the share of the rate at which its fall ends."""

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From ``KIND:STEPS[,rate=R][,beta=B][,schedule=S][,floor=F]``.

        Raises:
            ValueError: It is something else.
        """
        head, *options = text.split(",")
        kind, _, steps = head.partition(":")
        if kind not in RATES or not steps.isdigit():
            raise ValueError(
                f"A stage must be KIND:STEPS with a kind of {', '.join(RATES)}, got {text!r}. Use e.g. distil:400."
            )
        given = dict(option.split("=", 1) for option in options)
        if unknown := set(given) - {"rate", "beta", "schedule", "floor"}:
            raise ValueError(
                f"A stage has rate, beta, schedule and floor, got {', '.join(sorted(unknown))} in {text!r}. Leave it out."
            )
        schedule = given.pop("schedule", "linear")
        numbers = {"rate": RATES[kind], **{name: float(value) for name, value in given.items()}}
        return cls(kind, int(steps), schedule=schedule, **numbers)


@dataclass(frozen=True)
class Settings:
    """What is trained and how; a run is this and a seed."""

    task: str
    arm: str
    stages: tuple[Stage, ...]
    ranged: bool = False
    """Whether the window is drawn from the task's range for each batch."""
    probe_every: int = 0
    """Steps between two evaluations on the way; 0: none."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of `PTEConfig` beyond those of the arm."""

    @property
    def name(self) -> str:
        """Task, arm, stages and what differs."""
        parts = [self.task, self.arm]
        for stage in self.stages:
            parts += [stage.kind, str(stage.steps), f"{stage.rate:g}"]
            parts += [] if stage.beta is None else [f"beta-{stage.beta:g}"]
        parts += [f"{name}-{value}" for name, value in self.overrides.items()]
        return "-".join([*parts, *(["range"] if self.ranged else [])])

    def config(self, task: Task, **options: Any) -> PTEConfig:
        """The adapter's config."""
        fields = {
            "r": task.rank,
            "num_global_tokens": task.rank,
            "cache_window": task.window,
            "prompt_end": task.prompt_end,
        }
        return PTEConfig(**{"task_type": "CAUSAL_LM", **fields, **ARMS[self.arm][1], **options, **self.overrides})


def assignment(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE`` of a command line; a value that is no Python literal is a string."""
    field_name, equals, value = text.partition("=")
    if not (field_name and equals):
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text!r}. Write e.g. update_gain=1.0.")
    try:
        return field_name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field_name, value
