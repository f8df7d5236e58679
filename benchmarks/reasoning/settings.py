"""The four arms, and the forms of a run: what is trained, how, and how it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, PeftConfig

from examples.common import SMOLLM2
from peft_pte import PTEConfig

ARMS = {
    "lora": "LoRA, full cache",
    "lora-c": "LoRA_c",
    "global-only": "Global-Only",
    "pte": "PTE",
}
STATE_UPDATE = {"lora-c": "off", "global-only": "frozen", "pte": "progressive"}


@dataclass(frozen=True)
class Settings:
    """A run is this and a seed. The defaults are for two CPU cores."""

    arm: str = "pte"
    task: str = "products"
    model: str = SMOLLM2
    dtype: str = "float32"
    window: int = 24
    evict_ratio: float = 0.25
    rank: int = 16
    global_tokens: int = 16
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of PTEConfig that differ from its defaults, beyond those of the arm."""
    max_completion: int = 56
    min_thought: int = 32
    """Tokens; an answer after fewer is not solved: it would never have left the window."""
    temperature: float = 0.7
    steps: int = 12
    prompts: int = 2
    """Problems per step."""
    generations: int = 8
    """Completions per problem."""
    micro_batch: int = 8
    """Completions that are scored together."""
    learning_rate: float = 3e-4
    gradient_checkpointing: bool = False
    training_problems: int = 1000
    evaluation_problems: int = 24
    samples: int = 8
    """Completions per problem of an evaluation; at least the k of pass@k."""
    evaluation_batch: int = 96
    """Completions that an evaluation samples together."""

    @property
    def bounded(self) -> bool:
        """Whether the arm has the window."""
        return self.arm != "lora"

    @property
    def evict(self) -> int:
        """Thoughts that leave the window at an eviction."""
        return PTEConfig(cache_window=self.window, evict_ratio=self.evict_ratio).tokens_per_eviction

    def config(self, state_update: str | None = None) -> PeftConfig:
        """The adapter's config; ``state_update`` in place of the arm's. All arms adapt the same linears at one scale.

        Raises:
            ValueError: ``arm`` is unknown, or it takes no fields of PTEConfig.
        """
        if self.arm not in ARMS:
            raise ValueError(f"`arm` must be one of {', '.join(ARMS)}, got {self.arm!r}.")
        if not self.bounded:
            # "all-linear" leaves the output head out, as PTEConfig's default does; alpha = 2 R there is `None`.
            return LoraConfig(task_type="CAUSAL_LM", r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
        update = state_update or STATE_UPDATE[self.arm]
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "num_global_tokens": self.rank if update == "off" else self.global_tokens,
            "cache_window": self.window,
            "evict_ratio": self.evict_ratio,
            "state_update": update,
            "encoder_attention": "linear",
        }
        return PTEConfig(**{**fields, **self.overrides})


FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    # Four in five completions of the default form ran into its 56 tokens.
    "roomy": {"max_completion": 96},
    "quick": {
        "steps": 2,
        "prompts": 1,
        "max_completion": 48,
        "min_thought": 24,
        "training_problems": 32,
        "evaluation_problems": 4,
    },
    "long": {
        "steps": 200,
        "prompts": 16,
        "micro_batch": 32,
        "max_completion": 256,
        "min_thought": 96,
        "window": 64,
        "rank": 32,
        "global_tokens": 32,
        "samples": 32,
        "evaluation_batch": 512,
    },
}
"""`long` is for a GPU."""


def settings_for(arm: str, task: str, form: str = "default", **changes: Any) -> Settings:
    """The settings of a form, changed where ``changes`` are not ``None``."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(Settings(arm=arm, task=task), **{**FORMS[form], **given})
