"""A task as the stages of a recipe see it: text to write or to read, and what is right under which window."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.common import load_model
from peft_pte import PTEConfig

from ...common.models import random_llama
from ...common.records import FOLDER

BASES = FOLDER / "learning" / "bases"
"""Base models, in the repository: training from scratch ends elsewhere on another machine, and runs go on from files."""
LAYERS = 2
EVALUATION_SEED = 777_000
"""One set of problems for every run; no seed of a training comes near it."""
BATCH_TOKENS = 6144
ENOUGH = 0.97

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """``B`` sequences with what supervision shows of them."""

    input_ids: Tensor
    """``[B, N]``."""
    labels: Tensor
    """``[B, N]``, -100 where nothing is asked."""
    prompt: int
    """Columns of prompt."""

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))


class Task(ABC):
    """What is learned."""

    name: str
    window: int
    windows: tuple[int | None, ...] = ()
    """A range to draw from in training, ``window`` first."""
    probe: tuple[int | None, ...]
    """Windows that are evaluated: three quarters of the smallest that is trained, and the range."""
    forms: tuple[dict[str, Any], ...] = ({},)
    """Of an evaluation: further arguments of :meth:`evaluate`."""
    count: int
    """Sequences of an evaluation."""
    probed: int
    """The same on the way."""
    prompt_end: int | list[int] | None = None
    rank: int = 32
    batch: int = 64
    micro_batch: int = 64
    given: bool = False
    """Whether sequences are given, and not written by the model."""
    prompts: int = 8
    """Problems of a GRPO step."""
    generations: int = 8
    score_together: int | None = None
    """Completions of GRPO that are scored together; ``None``: all of a step."""
    temperature: float = 1.0
    log_every: int = 50
    save_every: int = 250

    @abstractmethod
    def base(self, seed: int) -> LlamaForCausalLM:
        """The base model of a seed, from the repository or trained."""

    @abstractmethod
    def make(self, count: int, generator: torch.Generator, done: float = 0.0) -> Batch:
        """Fresh sequences, ``done`` of a stage being over."""

    @abstractmethod
    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """Fresh sequences as text: ``prompt``, ``completion``."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of that text."""

    @abstractmethod
    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """Shares that are right under a window; the main one is ``recall``."""

    def baseline(self, model: PeftModel, window: int | None) -> dict[str, Any]:
        """What is said of a fresh adapter: by default how its base does on the full cache."""
        with model.disable_adapter():
            return {"base_full_cache": self.evaluate(model, None, self.count, **self.forms[0])}

    def reward(self, model: PeftModel) -> Callable[..., list[float]]:
        """Of GRPO."""
        raise NotImplementedError(
            f"`{self.name}` has nothing that a model writes. Use the stages supervise and distil."
        )

    def completion(self) -> int:
        """Tokens that a model may write."""
        sample = self.make(1, torch.Generator().manual_seed(0))
        return sample.input_ids.shape[1] - sample.prompt


def evict_of(window: int | None) -> int:
    """Thoughts that leave a window of ``window`` at an eviction; 0 if it is unbounded."""
    return 0 if window is None else PTEConfig(cache_window=window).tokens_per_eviction


def gone(thought: Tensor, window: int, evict: int) -> Tensor:
    """How many thoughts have left the window when the one in column ``thought`` (counted from 0) is computed.

    Thoughts fill the window; then ``evict`` of them leave whenever one must be written and there is no room.
    """
    return torch.where(thought < window, 0, ((thought - window) // evict + 1) * evict)


@contextmanager
def window_of(model: PeftModel, window: int | None) -> Iterator[None]:
    """Within the block, the adapter works under a cache of ``window`` thoughts (``None``: all), its weights the same.

    A cache is made from the config at the start of every call, so that is all there is to change.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    model.peft_config[name] = replace(config, cache_window=window)
    try:
        yield
    finally:
        model.peft_config[name] = config


class Training:
    """AdamW with clipped gradients; the learning rate rises linearly, then falls linearly to a floor."""

    def __init__(self, model: nn.Module, rate: float, rise: int, decay: int, floor: float, **adam: Any) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, **{"weight_decay": 0.0, **adam})
        self.schedule = LambdaLR(self.optimizer, lambda step: min((step + 1) / rise, max(floor, 1 - step / decay)))

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()


def small_base(
    folder: Path,
    seed: int,
    config: dict[str, Any],
    stages: Sequence[tuple[Callable[[torch.Generator], tuple[Batch, Tensor]], int]],
    fluent: float = 0.0,
) -> LlamaForCausalLM:
    """The Llama of width 64 at ``folder``; if it is not there, trained with its full cache and saved.

    Args:
        folder: Where it lies.
        seed: Of weights and data.
        config: Further fields of the config.
        stages: Of the training: a function that makes a batch and says which of its tokens ``[B, N]`` are answers, and the most steps. A
            stage ends when 99 % of the answers of its last 25 batches are right.
        fluent: The share of all labels that must be right before the last stage ends: a generation follows its own text.

    Raises:
        RuntimeError: It does not recall 97 % of the answers of the last stage.
    """
    path = folder / f"base-{LAYERS}-layers-seed-{seed}"
    if not (path / "config.json").exists():
        torch.manual_seed(seed)
        model = random_llama(
            inner=128, width=64, layers=LAYERS, heads=4, kv_heads=4, tie_word_embeddings=False, **config
        )
        _pretrain(model.train(), seed, stages, fluent)
        model.eval().save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path)


def _pretrain(model: Any, seed: int, stages: Any, fluent: float) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    training = Training(model, 3e-3, rise=50, decay=2500, floor=0.1, weight_decay=0.01, betas=(0.9, 0.98))
    mean, step = 0.0, 0
    for place, (make, most) in enumerate(stages):
        recent: deque[tuple[float, float]] = deque(maxlen=25)
        for _ in range(most):
            batch, asked = make(generator)
            output = model(batch.input_ids, labels=batch.labels, use_cache=False)
            training.step(output.loss)
            right = output.logits[:, :-1].argmax(dim=-1) == batch.input_ids[:, 1:]
            shares = (right[chosen[:, 1:]].float().mean() for chosen in (asked, batch.labels != -100))
            recent.append(tuple(map(float, shares)))
            mean, tokens = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            step += 1
            if step % 100 == 0:
                log.info("step %d, stage %d: loss %.3f, answers right %.3f", step, place, output.loss.detach(), mean)
            if len(recent) == recent.maxlen and mean > 0.99 and (place < len(stages) - 1 or tokens > fluent):
                break
    if mean < ENOUGH:
        raise RuntimeError(
            f"The base model recalls {mean:.1%} of the answers with a full cache, which is too few to measure a bounded one with. "
            "Give its last stage more steps."
        )


@cache
def tokenizer_of(model: str) -> PreTrainedTokenizerFast:
    """That of a model of the examples."""
    return load_model(model, "float32")[1]


def digest(model: nn.Module) -> str:
    """Tells whether two runs started from the same weights: training from scratch ends elsewhere on another machine."""
    hashed = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
