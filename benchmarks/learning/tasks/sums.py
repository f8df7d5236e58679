"""A real model thinks past its window: SmolLM2-135M-Instruct on reasoning-gym, prompts that ask for the steps, a verifier, splits that share no problem."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.common import SMOLLM2, load_model, make_task, verify

from ...common.arithmetic import full_cache_bytes
from ...common.intervals import clustered_share
from .task import Batch, Task, tokenizer_of, window_of

CONFIG = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Of the data sets, at which SmolLM2-135M-Instruct starts between 5 and 60 %."""
BARE = " Give only the result as your final answer."
"""What the data sets ask for and a model that is to think must not be asked for."""
INSTRUCTION = 'First explain in two sentences how to find the result. Then write "Answer: " and the result.'
HELD_OUT_SEED, TRAINING_SEED, SAMPLING_SEED = 777, 7_000, 4242
"""Of the problems of an evaluation; of those of a training, plus that of its generator; of what an evaluation samples."""
TRAINING = 1000
"""Problems of a training."""
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


@cache
def draw(dataset: str, seed: int, count: int, held_out: int = 0) -> Problems:
    """``count`` problems that are none of those ``held_out`` for the evaluation, and may repeat; if none are, all different.

    Raises:
        ValueError: There are not so many.
    """
    source = make_task(dataset, json.dumps(CONFIG), max(DRAWS, 2 * count), seed)
    without = draw(dataset, HELD_OUT_SEED, held_out).entries if held_out else ()
    seen, entries = {identity(entry["question"]) for entry in without}, []
    for entry in source:
        name = identity(entry["question"])
        if name in seen:
            continue
        if not held_out:
            seen.add(name)
        entries.append(entry)
        if len(entries) == count:
            return Problems(source, tuple(entries))
    raise ValueError(
        f"`count` must be at most {len(entries)} for {dataset} at this config, got {count}. Ask for fewer."
    )


@dataclass(frozen=True)
class Sums(Task):
    """One digit times, or plus or minus, one digit, explained first. The defaults are for two CPU cores."""

    name: str
    dataset: str
    max_completion: int = 56
    min_thought: int = 32
    """Tokens; an answer after fewer does not count: it would never have left the window."""
    window: int = 24
    rank: int = 16
    temperature: float = 0.7
    prompts: int = 2
    generations: int = 8
    score_together: int = 8
    count: int = 24
    samples: int = 8
    """Completions per problem of an evaluation; at least the k of pass@k."""
    evaluation_batch: int = 96
    """Completions that an evaluation samples together."""
    model: str = SMOLLM2
    log_every, probed = 1, 4

    @property
    def probe(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """Its own window."""
        return (self.window,)

    def held_out(self) -> Problems:
        """Those of the evaluation, the same for every run."""
        return draw(self.dataset, HELD_OUT_SEED, self.count)

    def base(self, seed: int) -> LlamaForCausalLM:
        """SmolLM2, whatever the seed."""
        return load_model(self.model, "float32")[0]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""
        return tokenizer_of(self.model)

    def make(self, count: int, generator: torch.Generator, done: float = 0.0) -> Batch:
        """There is none: nobody wrote solutions."""
        raise NotImplementedError(f"`{self.name}` has no solutions to learn from. Use the stage grpo.")

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """Prompts, the index of their problem, and the seed it was drawn with."""
        seed = TRAINING_SEED + generator.initial_seed()
        problems = draw(self.dataset, seed, TRAINING, self.count)
        rows = [{"prompt": problems.prompt(at), "problem": at, "drawn": seed} for at in range(TRAINING)]
        return Dataset.from_list(rows)

    def completion(self) -> int:
        """Tokens that a model may write."""
        return self.max_completion - 1

    def reward(self, model: PeftModel) -> Callable[..., list[float]]:
        """1 for a right answer after ``min_thought`` tokens or more, else 0."""
        tokenizer = self.tokenizer()

        def solved(
            prompts: list[Any],
            completions: list[Any],
            completion_ids: list[list[int]],
            problem: list[int],
            drawn: list[int],
            log_metric: Any,
            **kwargs: Any,
        ) -> list[float]:
            asked = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
            # The last token of a completion is never fed back.
            written, prompt = max(map(len, completion_ids)) - 1, max(map(len, asked))
            sizes = {"batch": len(prompts), "prompt": prompt, "length": written, "itemsize": model.dtype.itemsize}
            log_metric("full_cache_bytes", float(full_cache_bytes(model.config, **sizes)))
            problems = draw(self.dataset, drawn[0], TRAINING, self.count)
            right = [
                problems.right(index, messages[-1]["content"])
                for messages, index in zip(completions, problem, strict=True)
            ]
            log_metric("right", sum(right) / len(right))
            return [float(ok and len(ids) >= self.min_thought) for ok, ids in zip(right, completion_ids, strict=True)]

        return solved

    def baseline(self, model: PeftModel, window: int | None) -> dict[str, Any]:
        """The base model under the window of the arm: a fresh adapter is the base model."""
        return {"before": self.evaluate(model, window, self.count)}

    @torch.no_grad()
    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """Every problem sampled some times.

        Returns:
            ``right`` and ``lengths`` (tokens, the end of text among them), a list per problem and an entry per sample, ``seconds``, ``examples``:
            the first completion of the first problems, and ``recall``: the share that is right after enough tokens.
        """
        tokenizer, problems = self.tokenizer(), self.held_out()
        model.eval()
        torch.manual_seed(SAMPLING_SEED)
        order = [index for index in range(count) for _ in range(self.samples)]
        right: list[list[bool]] = [[] for _ in range(count)]
        lengths: list[list[int]] = [[] for _ in range(count)]
        first: dict[int, str] = {}
        start = time.perf_counter()
        for offset in range(0, len(order), self.evaluation_batch):
            rows = order[offset : offset + self.evaluation_batch]
            prompts = [problems.prompt(index) for index in rows]
            batch = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
            ).to(model.device)
            with window_of(model, window):
                sequences = model.generate(
                    **batch,
                    max_new_tokens=self.max_completion,
                    do_sample=True,
                    temperature=self.temperature,
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
        counted = torch.tensor(solved(right, lengths, self.min_thought))
        return {
            "recall": clustered_share(counted, torch.ones_like(counted)),
            "right": right,
            "lengths": lengths,
            "seconds": time.perf_counter() - start,
            "examples": [{"problem": problems.prompt(at)[-1]["content"], "completion": first[at]} for at in range(2)],
        }


def solved(right: list[list[bool]], lengths: list[list[int]], min_thought: int) -> list[list[bool]]:
    """Which samples are right after ``min_thought`` tokens or more, by problem."""
    return [
        [ok and length >= min_thought for ok, length in zip(*pair, strict=True)]
        for pair in zip(right, lengths, strict=True)
    ]


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
