"""State tracking: walk a state through fixed permutations, step by step, then name the states that were asked for.

A problem and its solution, with four steps and two questions::

    <bos> C   3 b   4 a   5 e   6 b   ask 5 3 think      prompt: start state, (index, operation) per step, questions
    3 b A   4 a F   5 e F   6 b H   answer 5 F 3 A <eos>  completion: (index, operation, state) per step, then answers

What an operation does to a state is fixed (``TABLE``), so a step is easy; a state is the work of all steps before it, so a state
that was forgotten takes the whole chain again. Every token is one word. Steps are numbered from a random index on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ...common.intervals import clustered_share
from ...common.models import words_tokenizer
from .task import (
    BASES,
    BATCH_TOKENS,
    EVALUATION_SEED,
    Batch,
    Task,
    evict_of,
    gone,
    small_base,
    window_of,
)

MICRO_BATCH = 256

STATES = "ABCDEFGH"
OPERATIONS = "abcdefgh"
INDICES = 24
STEP = 3
"""Tokens of a step of the trace."""
WORDS = (
    *("<pad>", "<eos>", "<bos>", "ask", "think", "answer"),
    *(str(index) for index in range(INDICES)),
    *OPERATIONS,
    *STATES,
)
VOCABULARY = {word: token for token, word in enumerate(WORDS)}
PAD, EOS, BOS, ASK, THINK, ANSWER = range(6)
FIRST_INDEX = VOCABULARY["0"]
FIRST_OPERATION = VOCABULARY[OPERATIONS[0]]
FIRST_STATE = VOCABULARY[STATES[0]]
TABLE = torch.rand(len(OPERATIONS), len(STATES), generator=torch.Generator().manual_seed(0)).argsort(dim=1)
"""``[operations, states]``, the state after an operation."""


@dataclass(frozen=True)
class Problems:
    """``B`` problems of ``N`` steps and ``F`` questions, with their solutions."""

    prompt_ids: Tensor
    """``[B, P]``."""
    completion_ids: Tensor
    """``[B, T]``."""
    asked: Tensor
    """``[B, F]``, steps that are asked for, in order, counted from 0."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def steps(self) -> int:
        """``N``."""
        return (self.completion_ids.shape[1] - 2 - 2 * self.asked.shape[1]) // STEP

    @property
    def stated(self) -> Tensor:
        """``[B, F]``, thought (column of the completion) that states what is asked for."""
        return STEP * self.asked + STEP - 1

    @property
    def recalled(self) -> Tensor:
        """``[F]``, thought whose logits must recall it: the index of the answer."""
        return STEP * self.steps + 1 + 2 * torch.arange(self.asked.shape[1])

    def held(self, window: int | None, evict: int) -> Tensor:
        """``[B, F]``, whether the state is in the window when it must be recalled."""
        if window is None:
            return torch.ones_like(self.asked, dtype=torch.bool)
        return self.stated >= gone(self.recalled, window, evict)

    def labels(self) -> Tensor:
        """``[B, P + T]``, the completion; -100 on the prompt."""
        return torch.cat([torch.full_like(self.prompt_ids, -100), self.completion_ids], dim=1)

    def input_ids(self) -> Tensor:
        """``[B, P + T]``."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)


def make_problems(batch: int, steps: int, asked: int, generator: torch.Generator) -> Problems:
    """Random problems.

    Args:
        batch: ``B``.
        steps: ``N``, at most ``INDICES``.
        asked: ``F``, at most ``steps``.
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: There are too many steps or questions.
    """
    if not 1 <= steps <= INDICES:
        raise ValueError(f"`steps` must be from 1 to {INDICES}, got {steps}. Use 20.")
    if not 1 <= asked <= steps:
        raise ValueError(f"`asked` must be from 1 to the number of steps, {steps}, got {asked}. Use fewer questions.")
    first = torch.randint(INDICES - steps + 1, (batch, 1), generator=generator)
    indices = FIRST_INDEX + first + torch.arange(steps)
    operations = torch.randint(len(OPERATIONS), (batch, steps), generator=generator)
    state = start = torch.randint(len(STATES), (batch,), generator=generator)
    walked = []
    for step in range(steps):
        state = TABLE[operations[:, step], state]
        walked.append(state)
    states = FIRST_STATE + torch.stack(walked, dim=1)
    questions = torch.rand(batch, steps, generator=generator).argsort(dim=1)[:, :asked]

    def column(token: int) -> Tensor:
        return torch.full((batch, 1), token)

    def woven(*rows: Tensor) -> Tensor:
        return torch.stack(rows, dim=2).flatten(1)

    asked_indices = indices.gather(1, questions)
    prompt = [column(BOS), FIRST_STATE + start[:, None], woven(indices, FIRST_OPERATION + operations)]
    prompt += [column(ASK), asked_indices, column(THINK)]
    completion = [woven(indices, FIRST_OPERATION + operations, states), column(ANSWER)]
    completion += [woven(asked_indices, states.gather(1, questions)), column(EOS)]
    return Problems(torch.cat(prompt, dim=1), torch.cat(completion, dim=1), questions)


def words(ids: list[int]) -> str:
    """The text of tokens."""
    return " ".join(WORDS[token] for token in ids)


def grade(completion: str, solution: str) -> list[bool]:
    """Whether each question is answered: its index in its place, and the state after it.

    Args:
        completion: What was generated; what comes before the first ``answer`` and after ``<eos>`` does not count.
        solution: The right completion.
    """
    wanted, given = _answers(solution), _answers(completion)
    pairs = list(zip(given[::2], given[1::2], strict=False))
    return [
        place < len(pairs) and pairs[place] == pair
        for place, pair in enumerate(zip(wanted[::2], wanted[1::2], strict=True))
    ]


def _answers(completion: str) -> list[str]:
    _, _, answers = completion.partition("<eos>")[0].partition("answer")
    return answers.split()


def exact(completions: list[str], solution: list[str], **kwargs: object) -> list[float]:
    """The reward: 1 where every question is answered, else 0."""
    return [float(all(grade(completion, right))) for completion, right in zip(completions, solution, strict=True)]


class Permutation(Task):
    """Six steps and one question of the last state of one of them, a window of 8; cut down until supervision needs some 200 steps from chance to 95 %."""

    name = "permutation"
    window, windows, probe = 8, (8, 12, 16, None), (6, 8, 12, 16, None)
    prompt_end = [THINK]  # noqa: RUF012
    count, probed = 1024, 512
    steps, asked = 6, 1

    def base(self, seed: int) -> LlamaForCausalLM:
        """Trained on shorter problems, on four questions at once, on one."""

        def stage(steps: int, asked: int) -> Callable[[torch.Generator], tuple[Batch, Tensor]]:
            def make(generator: torch.Generator) -> tuple[Batch, Tensor]:
                problems = make_problems(BATCH_TOKENS // (5 * steps + 3 * asked + 5), steps, asked, generator)
                answers = torch.zeros_like(problems.input_ids(), dtype=torch.bool)
                answers[:, problems.prompt_ids.shape[1] + problems.recalled + 1] = True
                return Batch(problems.input_ids(), problems.labels(), problems.prompt_ids.shape[1]), answers

            return make

        ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        config = {"vocabulary": len(WORDS), "positions": 1024, **ends}
        stages = [(stage(4, 2), 1500), (stage(self.steps, 4), 800), (stage(self.steps, self.asked), 1500)]
        return small_base(BASES / self.name, seed, config, stages, fluent=0.999)

    def make(self, count: int, generator: torch.Generator, done: float = 0.0) -> Batch:
        """Problems with their solutions; the labels are the completion."""
        problems = make_problems(count, self.steps, self.asked, generator)
        return Batch(problems.input_ids(), problems.labels(), problems.prompt_ids.shape[1])

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """``solution`` too, for the reward."""
        problems = make_problems(count, self.steps, self.asked, generator)
        prompts, solutions = (
            [words(row) for row in ids.tolist()] for ids in (problems.prompt_ids, problems.completion_ids)
        )
        return Dataset.from_dict({"prompt": prompts, "completion": solutions, "solution": solutions})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word."""
        return words_tokenizer(VOCABULARY, "<pad>", "<eos>", "<bos>")

    def reward(self, model: PeftModel) -> Callable[..., list[float]]:
        """1 for a whole answer."""
        return exact

    @torch.no_grad()
    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """``recall``: all answers, greedily; ``in_window``, ``evicted``: by what the window still holds (the first state can be redone from the prompt).

        Answers to one problem stand or fall together, so problems are what is counted.
        """
        problems = make_problems(count, self.steps, self.asked, torch.Generator().manual_seed(EVALUATION_SEED))
        model.eval()
        torch.manual_seed(EVALUATION_SEED)
        with window_of(model, window):
            right = self._answers(model, problems)
        held = problems.held(window, evict_of(window))
        chosen = {"recall": torch.ones_like(right), "in_window": held, "evicted": ~held}
        return {name: clustered_share(right, part) for name, part in chosen.items()}

    def _answers(self, model: PeftModel, problems: Problems) -> Tensor:
        """``[B, F]``, which questions are answered right."""
        right = []
        for start in range(0, len(problems), MICRO_BATCH):
            prompt = problems.prompt_ids[start : start + MICRO_BATCH].to(model.device)
            ids = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=problems.completion_ids.shape[1] + 3,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
            solutions = problems.completion_ids[start : start + MICRO_BATCH].tolist()
            for tokens, solution in zip(ids[:, prompt.shape[1] :].tolist(), solutions, strict=True):
                right.append(grade(words(tokens), words(solution)))
        return torch.tensor(right)
