"""pass@k of a model under its own cache, with 95 % intervals over problems."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from .settings import Settings
from .task import Problems

SAMPLING_SEED = 4242
RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of pass@k of one problem: ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374).

    Args:
        samples: Completions ``n``.
        right: Those ``c`` of them that are right.
        k: At most ``n``.

    Raises:
        ValueError: ``k`` is not between 1 and ``samples``, or ``right`` not between 0 and ``samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"`k` must be between 1 and the {samples} samples, got {k}. Take more samples.")
    if not 0 <= right <= samples:
        raise ValueError(f"`right` must be between 0 and the {samples} samples, got {right}.")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values``, one value a problem, which are resampled."""
    rows = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
    low, high = rows[picked].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def evictions(length: int, settings: Settings) -> int:
    """How often a completion of ``length`` tokens makes the window evict."""
    return max(0, math.ceil((length - settings.window) / settings.evict))


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, problems: Problems, settings: Settings) -> dict[str, Any]:
    """Sample every problem ``settings.samples`` times.

    Returns:
        ``right`` and ``lengths`` (tokens, the end of text among them), one list per problem and one entry per sample,
        ``seconds``, and ``examples``: the first completion of the first problems.
    """
    was_training = model.training
    model.eval()
    torch.manual_seed(SAMPLING_SEED)
    order = [index for index in range(len(problems)) for _ in range(settings.samples)]
    right: list[list[bool]] = [[] for _ in range(len(problems))]
    lengths: list[list[int]] = [[] for _ in range(len(problems))]
    first: dict[int, str] = {}
    start = time.perf_counter()
    for offset in range(0, len(order), settings.evaluation_batch):
        rows = order[offset : offset + settings.evaluation_batch]
        batch = tokenizer.apply_chat_template(
            [problems.prompt(index) for index in rows],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        sequences = model.generate(
            **batch,
            max_new_tokens=settings.max_completion,
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, row in zip(rows, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ends = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:ends], skip_special_tokens=True)
            right[index].append(problems.right(index, text))
            lengths[index].append(ends)
            first.setdefault(index, text)
    seconds = time.perf_counter() - start
    model.train(was_training)
    examples = [{"problem": problems.prompt(index)[-1]["content"], "completion": first[index]} for index in range(2)]
    return {"right": right, "lengths": lengths, "seconds": seconds, "examples": examples}


def solved(evaluation: dict[str, Any], min_thought: int) -> list[list[bool]]:
    """Which samples are right after ``min_thought`` tokens or more, by problem."""
    return [
        [ok and length >= min_thought for ok, length in zip(*pair, strict=True)]
        for pair in zip(evaluation["right"], evaluation["lengths"], strict=True)
    ]


def per_problem(samples: Sequence[Sequence[bool]], k: int) -> list[float]:
    """pass@k of each problem."""
    return [pass_at_k(len(row), sum(row), k) for row in samples]
