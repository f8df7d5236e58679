"""Two tasks of reasoning-gym, prompts that ask for the steps, a verifier, and splits that share no problem."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from examples.common import make_task, verify

TASKS: dict[str, dict[str, Any]] = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
"""Data sets of reasoning-gym and their configs, at which SmolLM2-135M-Instruct starts between 5 and 60 %."""
BARE = " Give only the result as your final answer."
"""What the data sets ask for and a model that is to think must not be asked for."""
INSTRUCTION = 'First explain in two sentences how to find the result. Then write "Answer: " and the result.'
EVALUATION_SEED = 777
"""One set of problems for every run; no training seed comes near it."""
TRAINING_SEED = 10_000
"""Plus the seed of the run."""
DRAWS = 4000
"""Problems drawn for a split before those that it must not hold are left out."""


@dataclass(frozen=True)
class Problems:
    """Problems of one split, in the data set that verifies their answers."""

    dataset: Any
    entries: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def prompt(self, index: int) -> list[dict[str, str]]:
        """The conversation that asks problem ``index``."""
        question = self.entries[index]["question"].replace(BARE, "")
        return [{"role": "user", "content": f"{question} {INSTRUCTION}"}]

    def right(self, index: int, text: str) -> bool:
        """Whether the data set's own verifier gives the answer in ``text`` full marks.

        Its score is taken at 0.99: many verifiers of reasoning-gym give partial credit, and a floor to any answer.
        """
        return bool(verify(self.dataset, self.entries[index], text))


def identity(question: str) -> str:
    """What makes two problems the same: their characters, in any order, so that 3 * 4 is 4 * 3."""
    return "".join(sorted(question))


def evaluation_problems(task: str, count: int) -> Problems:
    """``count`` different problems, the same for every run.

    Raises:
        ValueError: ``task`` is unknown, or it has not so many different problems that training still has some.
    """
    return _draw(task, EVALUATION_SEED, count, frozenset(), distinct=True)


def training_problems(task: str, seed: int, count: int, held_out: Problems) -> Problems:
    """``count`` problems of which none is in ``held_out``; a task with few problems repeats them.

    Raises:
        ValueError: ``task`` is unknown, or ``held_out`` leaves too few.
    """
    without = frozenset(identity(entry["question"]) for entry in held_out.entries)
    return _draw(task, TRAINING_SEED + seed, count, without, distinct=False)


def _draw(task: str, seed: int, count: int, without: frozenset[str], distinct: bool) -> Problems:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    dataset = make_task(task, json.dumps(TASKS[task]), max(DRAWS, 2 * count), seed)
    seen, entries = set(without), []
    for entry in dataset:
        name = identity(entry["question"])
        if name in seen:
            continue
        if distinct:
            seen.add(name)
        entries.append(entry)
        if len(entries) == count:
            return Problems(dataset, tuple(entries))
    raise ValueError(
        f"`count` must be at most {len(entries)} for {task} at this config, got {count}. Ask for fewer, or give the task a "
        "wider config in benchmarks/reasoning/task.py."
    )
