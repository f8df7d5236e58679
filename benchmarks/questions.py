"""The questions: what each asks, how long it takes, what it wants. Its folder has `measure.py`, `report.py` and its results."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Question:
    """One line of the list."""

    asks: str
    takes: str
    wants: str = "CPU"


QUESTIONS = {
    "speed": Question("How fast are decoding, evictions, adapters and training steps?", "8 minutes", "GPU"),
    "overhead": Question("What do a step and a token cost beside LoRA: launches, CPU time, peak?", "20 minutes"),
    "operations": Question("How many operations does a GRPO step take at true shapes?", "5 minutes"),
    "footprint": Question("How many bytes do cache and training need? Is scoring the rollout?", "25 minutes"),
    "protocol": Question("What would the paper's protocol take: operations, memory, hours?", "10 minutes"),
    "kernels": Question("How many bytes must each kernel move at least?", "nothing to run, arithmetic"),
    "refill": Question("What do rows that are refilled save over rows that wait?", "10 minutes"),
    "half": Question("Does half precision keep the policy?", "1 hour"),
    "eviction": Question("What does choosing what leaves cost?", "3 minutes"),
    "models": Question("Which causal LMs of transformers work?", "5 minutes"),
    "learning": Question(
        "What does it recall and learn: supervision, distillation, GRPO?", "1 to 70 minutes a run", "CPU or GPU"
    ),
}


def module(name: str, part: str) -> Any:
    """``measure`` or ``report`` of a question."""
    return import_module(f"benchmarks.{name}.{part}")


def overview() -> str:
    """A line for each question."""
    lines = [f"{name:11} {q.asks:82} {q.wants:4} {q.takes}" for name, q in QUESTIONS.items()]
    return "\n".join(["run QUESTION | report [QUESTION ...], each takes --help", "", *lines])
