"""Accuracy of an adapted model under several cache windows, with its intervals and the controls of the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..common.intervals import clustered_share, share
from .task import EOS, PAD, Problems, grade, make_problems, words

EVALUATION_SEED = 777_000
"""One set of problems for every run; no seed of a training comes near it."""
MICRO_BATCH = 256


@contextmanager
def window_of(model: PeftModel, window: int | None) -> Iterator[None]:
    """Within the block, the adapter generates under a cache of ``window`` thoughts (``None``: all), its weights the same.

    A cache is made from the config at the start of every generation, so that is all there is to change.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    model.peft_config[name] = dataclasses.replace(config, cache_window=window)
    try:
        yield
    finally:
        model.peft_config[name] = config


@torch.no_grad()
def answers(model: PeftModel, problems: Problems, sample: bool) -> Tensor:
    """``[B, F]``, which questions ``model`` answers right, greedily or by sampling at temperature 1."""
    device = model.get_base_model().device
    right: list[list[bool]] = []
    for start in range(0, len(problems), MICRO_BATCH):
        prompt = problems.prompt_ids[start : start + MICRO_BATCH].to(device)
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=problems.completion_ids.shape[1] + 3,
            do_sample=sample,
            temperature=1.0 if sample else None,
            top_k=0 if sample else None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        solutions = problems.completion_ids[start : start + MICRO_BATCH].tolist()
        for tokens, solution in zip(ids[:, prompt.shape[1] :].tolist(), solutions, strict=True):
            right.append(grade(words(tokens), words(solution)))
    return torch.tensor(right)


def evaluate(
    model: PeftModel, window: int | None, evict: int, steps: int, asked: int, batch: int, sample: bool, layers: int
) -> dict[str, Any]:
    """Accuracy under a cache of ``window`` thoughts on ``batch`` problems.

    Returns:
        ``reward``, ``exact``, and the questions by what the cache still holds of them if the trace is the solution's:
        ``in_window``, ``evicted``, and of the latter ``beyond_relay``, further back than layers x window, where no chain of
        keys and values of kept tokens can have passed the state on. (The prompt is kept: who could redo the steps would not
        need to remember.)
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    problems = make_problems(batch, steps, asked, generator)
    model.eval()
    torch.manual_seed(EVALUATION_SEED)
    with window_of(model, window):
        right = answers(model, problems, sample)
    held = problems.held(window, evict)
    far = torch.zeros_like(held) if window is None else problems.distance > layers * window
    return {
        "window": window,
        "decoding": "sampled" if sample else "greedy",
        "problems": batch,
        # Answers to one problem stand or fall together, so problems are what is counted.
        "reward": clustered_share(right, torch.ones_like(right)),
        "exact": share(right.all(dim=1)),
        "in_window": clustered_share(right, held),
        "evicted": clustered_share(right, ~held),
        "beyond_relay": clustered_share(right, far),
    }
