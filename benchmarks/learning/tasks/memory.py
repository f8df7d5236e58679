"""The traces: facts `key = value` are stated, fillers and running states pass, keys are asked for later.

A trace is one BOS token (the prompt) and then events of three tokens in random order::

    fact      key  =    value        one key is stated at most once
    question  ?    key  value        every fact is asked for once, at a random later place; the value is the answer
    state     ~    s    s + 1        a running state, modulo its alphabet; s is what the state before ended with
    filler    x    x    x

A question repeats its fact, so each fact has one question: after it, the fact could be read from its answer.
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

from ...common.intervals import share
from ...common.models import words_tokenizer
from .task import (
    BASES,
    BATCH_TOKENS,
    EVALUATION_SEED,
    LAYERS,
    Batch,
    Task,
    evict_of,
    gone,
    small_base,
    window_of,
)

MICRO_BATCH = 256
BIN = 0.5
"""Width of a bin of the curve over distance, in windows."""

EVENT = 3
PROMPT = 1
VALUES = 16
KEYS = 32
STATES = 16
FILLERS = 16
PAD, BOS, EQUALS, ASK, STEP = range(5)
FIRST_KEY = 5
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_STATE = FIRST_VALUE + VALUES
FIRST_FILLER = FIRST_STATE + STATES
VOCABULARY = FIRST_FILLER + FILLERS
CHANCE = 1 / VALUES


@dataclass(frozen=True)
class Traces:
    """A batch of traces of ``T`` thoughts with ``F`` facts each."""

    input_ids: Tensor
    """``[B, 1 + T]``."""
    answers: Tensor
    """``[B, 1 + T]``, the token where it is an answer, -100 elsewhere: labels for adaptation."""
    predictable: Tensor
    """``[B, 1 + T]``, the token where it is an answer or the running state, -100 elsewhere: labels for pretraining."""
    stated: Tensor
    """``[B, F]``, column of the value where a fact is stated."""
    asked: Tensor
    """``[B, F]``, column of the key where it is asked for: its logits are the prediction of the answer."""
    running: Tensor
    """``[B, S]``, column whose logits predict the running state, from the second state of the trace on."""

    @property
    def distance(self) -> Tensor:
        """``[B, F]``, tokens between a fact's value and the token that must recall it."""
        return self.asked - self.stated


def held(stated: Tensor, asked: Tensor, window: int, evict: int) -> Tensor:
    """Whether the token in column ``stated`` is still in the window when the one in column ``asked`` is computed."""
    return stated - PROMPT >= gone(asked - PROMPT, window, evict)


def make_traces(batch: int, length: int, generator: torch.Generator, shift: int = 0) -> Traces:
    """``batch`` traces of ``length`` thoughts, a quarter of whose events are facts and a quarter questions.

    With a ``shift`` the answer is the value that many places on, modulo their number: another task, which a base model is yet to learn.

    Raises:
        ValueError: ``length`` is no multiple of an event's tokens, or has more facts than there are keys.
    """
    events = length // EVENT
    facts = events // 4
    if length % EVENT or not 1 <= facts <= KEYS:
        raise ValueError(
            f"`length` must be a multiple of {EVENT} from {4 * EVENT} to {(4 * KEYS + 3) * EVENT}, got {length}. Use 96."
        )
    order = torch.rand(batch, events, generator=generator).argsort(dim=1)
    # A random pairing of random places: the earlier one states, the later one asks.
    places = order[:, : 2 * facts].reshape(batch, facts, 2).sort(dim=2).values
    states = (events - 2 * facts) // 2
    state_places = order[:, 2 * facts : 2 * facts + states].sort(dim=1).values
    keys = FIRST_KEY + torch.rand(batch, KEYS, generator=generator).argsort(dim=1)[:, :facts]
    values = FIRST_VALUE + torch.randint(VALUES, (batch, facts), generator=generator)
    first_state = torch.randint(STATES, (batch, 1), generator=generator)
    state = first_state + torch.arange(states)

    tokens = FIRST_FILLER + torch.randint(FILLERS, (batch, events, EVENT), generator=generator)
    _write(tokens, places[:, :, 0], (EQUALS, keys, values), (1, 0, 2))
    answer = FIRST_VALUE + (values - FIRST_VALUE + shift) % VALUES
    _write(tokens, places[:, :, 1], (ASK, keys, answer), (0, 1, 2))
    _write(tokens, state_places, (STEP, FIRST_STATE + state % STATES, FIRST_STATE + (state + 1) % STATES), (0, 1, 2))

    input_ids = torch.cat([torch.full((batch, PROMPT), BOS), tokens.flatten(start_dim=1)], dim=1)
    stated = PROMPT + EVENT * places[:, :, 0] + 2
    asked = PROMPT + EVENT * places[:, :, 1] + 1
    running = PROMPT + EVENT * state_places[:, 1:]
    answers = _only(input_ids, asked + 1)
    predictable = _only(input_ids, torch.cat([asked + 1, running + 1, running + 2], dim=1))
    return Traces(input_ids, answers, predictable, stated, asked, running)


def _write(tokens: Tensor, places: Tensor, parts: tuple[Tensor | int, ...], offsets: tuple[int, ...]) -> None:
    row = torch.arange(tokens.shape[0])[:, None]
    for part, offset in zip(parts, offsets, strict=True):
        tokens[row, places, offset] = torch.as_tensor(part).expand_as(places)


def _only(input_ids: Tensor, columns: Tensor) -> Tensor:
    labels = torch.full_like(input_ids, -100)
    return labels.scatter(1, columns, input_ids.gather(1, columns))


def _word(token: int) -> str:
    """No special token is part of another word: those are found first, inside of words too."""
    return {PAD: "<pad>", BOS: "<bos>"}.get(token, f"t{token}")


@dataclass(frozen=True)
class Memory(Task):
    """Traces in a window of 32. They are given, as the base model writes none."""

    name: str = "memory"
    course: tuple[tuple[float, int], ...] = ((0.0, 96),)
    """Of a stage: from which share of its steps on traces have how many thoughts."""
    lengths: tuple[int, ...] = (96,)
    """Of the evaluation."""
    shift: int = 0
    """Of the answers: what the base model is yet to learn."""
    window = 32
    windows = (32, 48, 64, None)
    probe = (24, 32, 48, 64, None)
    prompt_end = PROMPT
    given = True
    count, probed = 512, 128

    @property
    def forms(self) -> tuple[dict[str, Any], ...]:  # type: ignore[override]
        """The lengths."""
        return tuple({"length": length} for length in self.lengths)

    def base(self, seed: int) -> LlamaForCausalLM:
        """Trained on answers and running states of short traces, which are then stretched. It answers with the value itself."""

        def stage(length: int) -> Callable[[torch.Generator], tuple[Batch, Tensor]]:
            def make(generator: torch.Generator) -> tuple[Batch, Tensor]:
                traces = make_traces(BATCH_TOKENS // length, length, generator)
                return Batch(traces.input_ids, traces.predictable, PROMPT), traces.answers != -100

            return make

        ends = {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD}
        config = {"vocabulary": VOCABULARY, "positions": 2048, **ends}
        return small_base(BASES / "memory", seed, config, [(stage(48), 4000), (stage(96), 800), (stage(240), 600)])

    def make(self, count: int, generator: torch.Generator, done: float = 0.0) -> Batch:
        """Traces; the labels are the answers."""
        length = next(length for start, length in reversed(self.course) if done >= start)
        traces = make_traces(count, length, generator, self.shift)
        return Batch(traces.input_ids, traces.answers, PROMPT)

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """All of a trace after its first token is the completion."""
        ids = make_traces(count, self.lengths[0], generator, self.shift).input_ids.tolist()
        texts = [" ".join(_word(token) for token in row) for row in ids]
        prompts, completions = zip(*(text.split(" ", 1) for text in texts), strict=True)
        return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word a token. What ends a sequence is in no trace."""
        return words_tokenizer({_word(token): token for token in range(VOCABULARY)}, _word(PAD), _word(PAD), _word(BOS))

    @torch.no_grad()
    def evaluate(self, model: PeftModel, window: int | None, count: int, length: int | None = None) -> dict[str, Any]:
        """Recall on traces of ``length`` thoughts, and by distance in halves of the *trained* window.

        ``recall`` is the honest one: facts from beyond relay, further than layers x trained window, where no kept token can have heard
        of them from one that had. ``in_window``, ``evicted``: by this window (of a full cache, by the trained one); ``to_1.5``, ``to_2.5``,
        ``over_2.5``: what was evicted, by distance in trained windows; ``all``; ``running``: the running state.
        """
        length = length or self.lengths[0]
        traces = make_traces(count, length, torch.Generator().manual_seed(EVALUATION_SEED + length), self.shift)
        model.eval()
        right, running = [], []
        for start in range(0, count, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            ids = traces.input_ids[part]
            with window_of(model, window):
                labels = traces.answers[part].to(model.device)
                best = model(input_ids=ids.to(model.device), labels=labels).logits.argmax(dim=-1).cpu()
            right.append(hits(best, ids, traces.asked[part]))
            running.append(hits(best, ids, traces.running[part]))
        found, windows = torch.cat(right), traces.distance / self.window
        at = window or self.window
        here = held(traces.stated, traces.asked, at, evict_of(at))
        chosen = {
            "recall": windows > LAYERS,
            "in_window": here,
            "evicted": ~here,
            "to_1.5": ~here & (windows <= 1.5),
            "to_2.5": (windows > 1.5) & (windows <= 2.5),
            "over_2.5": windows > 2.5,
            "all": torch.ones_like(here),
        }
        bins = (windows / BIN).ceil().long()
        return {
            **{name: share(found[part]) for name, part in chosen.items()},
            "running": share(torch.cat(running)),
            "by_distance": [
                {"up_to_windows": BIN * index, **share(found[bins == index])} for index in bins.unique().tolist()
            ],
        }


def hits(best: Tensor, input_ids: Tensor, columns: Tensor) -> Tensor:
    """Whether the token after each of ``columns [B, F]`` is the ``best [B, N]`` that was said there."""
    return best.gather(1, columns) == input_ids.gather(1, columns + 1)
