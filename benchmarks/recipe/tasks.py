"""The tasks, as the stages of a recipe see them: text to write or to read, and what is right under which window.

* ``permutation``: :mod:`benchmarks.rl.task` cut down until supervision needs some 200 steps from chance to 95 %: six steps, one question, a window of 8.
* ``memory``: :mod:`benchmarks.memory.task`, traces of 96 thoughts, a window of 32. Traces are given, as the base model writes none.
* ``shifted``: the same, with answers that the base model is yet to learn.
* ``notes``: :mod:`.notes`, SmolLM2-135M-Instruct on notes that are asked for after they left a window of 128.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_pte import PTEConfig

from ..memory import evaluate as memory_evaluation
from ..memory import model as memory_model
from ..memory import task as memory
from ..rl import evaluate as permutation_evaluation
from ..rl import model as permutation_model
from ..rl import task as permutation
from ..rl.evaluate import window_of

BASES = Path(__file__).resolve().parent / "bases"
"""Base models, in the repository: training from scratch ends elsewhere on another machine, and runs go on from files."""
LAYERS = 2


@dataclass(frozen=True)
class Batch:
    """``B`` sequences with what supervision shows of them."""

    input_ids: Tensor
    """``[B, N]``."""
    labels: Tensor
    """``[B, N]``, -100 where nothing is asked."""
    prompt: int
    """Columns of prompt."""


class Task(ABC):
    """What is learned."""

    name: str
    window: int
    windows: tuple[int | None, ...]
    """A range to draw from in training, ``window`` first."""
    probe: tuple[int | None, ...]
    """Windows that are evaluated: three quarters of the smallest that is trained, and the range."""
    prompt_end: int | list[int]
    batch: int = 64
    micro_batch: int = 64
    given: bool = False
    """Whether sequences are given, and not written by the model."""

    @abstractmethod
    def base(self, seed: int) -> LlamaForCausalLM:
        """The base model of a seed, from the repository or trained."""

    @abstractmethod
    def make(self, count: int, generator: torch.Generator) -> Batch:
        """Fresh sequences."""

    @abstractmethod
    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """Fresh sequences as text: ``prompt``, ``completion``."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word."""

    @abstractmethod
    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """Shares that are right under a window, greedily; the main one is ``recall``."""


def evict_of(window: int | None) -> int:
    """Thoughts that leave a window of ``window`` at an eviction; 0 if it is unbounded."""
    return 0 if window is None else PTEConfig(cache_window=window).tokens_per_eviction


class Permutation(Task):
    """Six steps, one question."""

    name = "permutation"
    window, windows, probe = 8, (8, 12, 16, None), (6, 8, 12, 16, None)
    prompt_end = [permutation.THINK]  # noqa: RUF012
    steps, asked = 6, 1

    def base(self, seed: int) -> LlamaForCausalLM:
        """Trained on shorter problems, on four questions at once, on one."""
        stages = ((4, 2, 1500), (self.steps, 4, 800), (self.steps, self.asked, 1500))
        return permutation_model.base_model(seed, LAYERS, folder=BASES / self.name, stages=stages)

    def make(self, count: int, generator: torch.Generator) -> Batch:
        """Problems with their solutions; the labels are the completion."""
        problems = permutation.make_problems(count, self.steps, self.asked, generator)
        return Batch(problems.input_ids(), problems.labels(), problems.prompt_ids.shape[1])

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """``solution`` too, for the reward."""
        problems = permutation.make_problems(count, self.steps, self.asked, generator)
        prompts, solutions = (
            [permutation.words(row) for row in ids.tolist()] for ids in (problems.prompt_ids, problems.completion_ids)
        )
        return Dataset.from_dict({"prompt": prompts, "completion": solutions, "solution": solutions})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """That of the task."""
        return permutation.make_tokenizer()

    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """``recall``: all answers; ``in_window``, ``evicted``: by what the window still holds (the first state can be redone from the prompt)."""
        found = permutation_evaluation.evaluate(
            model, window, evict_of(window), self.steps, self.asked, count, False, LAYERS
        )
        return {"recall": found["reward"], "in_window": found["in_window"], "evicted": found["evicted"]}


def _word(token: int) -> str:
    """No special token is part of another word: those are found first, inside of words too."""
    return {memory.PAD: "<pad>", memory.BOS: "<bos>"}.get(token, f"t{token}")


class Memory(Task):
    """Traces of 96 thoughts."""

    name = "memory"
    window, windows, probe = 32, (32, 48, 64, None), (24, 32, 48, 64, None)
    prompt_end = memory.PROMPT
    given = True
    length, shift = 96, 0

    def base(self, seed: int) -> LlamaForCausalLM:
        """That of :mod:`benchmarks.memory`."""
        return memory_model.base_model(seed, LAYERS, folder=BASES / self.name)

    def make(self, count: int, generator: torch.Generator) -> Batch:
        """Traces; the labels are the answers."""
        traces = memory.make_traces(count, self.length, generator, self.shift)
        return Batch(traces.input_ids, traces.answers, memory.PROMPT)

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """All of a trace after its first token is the completion."""
        ids = memory.make_traces(count, self.length, generator, self.shift).input_ids.tolist()
        texts = [" ".join(_word(token) for token in row) for row in ids]
        return Dataset.from_dict(
            {"prompt": [text.split(" ")[0] for text in texts], "completion": [text.split(" ", 1)[1] for text in texts]}
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word a token. What ends a sequence is in no trace."""
        words = {_word(token): token for token in range(memory.VOCABULARY)}
        pad, bos = _word(memory.PAD), _word(memory.BOS)
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=pad))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=pad, eos_token=pad, bos_token=bos, padding_side="left"
        )

    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """``recall``: facts beyond relay of the *trained* window's size; ``all``, ``in_window``, ``evicted``, ``running``: as in its benchmark."""
        with window_of(model, window):
            found = memory_evaluation.evaluate(
                model,
                self.length,
                count,
                window or self.length,
                evict_of(window) or 1,
                LAYERS,
                far=LAYERS * self.window,
                shift=self.shift,
            )
        buckets = found["buckets"]
        return {
            "recall": buckets["beyond_relay"],
            "all": found["all"],
            "in_window": buckets["window"],
            "evicted": buckets["evicted"],
            "running": found["running"],
        }


class Shifted(Memory):
    """The same, and the answer is the value three places on: what a LoRA has learned on a full cache before it is converted."""

    name, shift = "shifted", 3

    def base(self, seed: int) -> LlamaForCausalLM:
        """That of memory, which answers with the value itself."""
        return memory_model.base_model(seed, LAYERS, folder=BASES / Memory.name)
