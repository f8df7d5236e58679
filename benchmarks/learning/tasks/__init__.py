"""The tasks by name.

* ``permutation``: six steps of a state through permutations, one of them asked for, a window of 8.
* ``memory``: facts of a trace of 96 thoughts, asked for later, a window of 32; ``memory-162``: of longer ones; ``shifted``: the answer is the value
  three places on, which the base model is yet to learn.
* ``notes``: SmolLM2-135M-Instruct on notes that are asked for after they left a window of 128; ``few-notes``: on three, a window of 24.
* ``products``, ``chain_sum``: SmolLM2-135M-Instruct explains a sum within 56 tokens, or 96, or (for a GPU) 256, in a window of 24, or 64.
"""

from __future__ import annotations

from .memory import Memory
from .notes import FewNotes, Notes
from .permutation import Permutation
from .sums import Sums
from .task import Task

LONG = {
    "max_completion": 256,
    "min_thought": 96,
    "window": 64,
    "rank": 32,
    "prompts": 16,
    "score_together": 32,
    "samples": 32,
    "evaluation_batch": 512,
}
SUMS = ("products", "chain_sum")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Permutation(),
        Memory(),
        Memory("memory-162", course=((0.0, 96), (400 / 550, 162)), lengths=(162, 240)),
        Memory("shifted", shift=3),
        Notes(),
        FewNotes(),
        *(Sums(name, name) for name in SUMS),
        *(Sums(f"{name}-96", name, max_completion=96) for name in SUMS),
        *(Sums(f"{name}-long", name, **LONG) for name in SUMS),
    )
}
