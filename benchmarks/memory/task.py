"""The traces: facts `key = value` are stated, fillers and running states pass, keys are asked for later.

A trace is one BOS token (the prompt) and then events of three tokens in random order::

    fact      key  =    value        one key is stated at most once
    question  ?    key  value        every fact is asked for once, at a random later place; the value is the answer
    state     ~    s    s + 1        a running state, modulo its alphabet; s is what the state before ended with
    filler    x    x    x

A question repeats its fact, so each fact has one question: after it, the fact could be read from its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..small import gone

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

    def to(self, device: torch.device | str) -> Traces:
        """The same traces on ``device``."""
        return Traces(**{name: part.to(device) for name, part in vars(self).items()})


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
