"""Which token comes next in each row, and which rows end with it: the options of `generate`, row by row."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from ..host.compat import OF_SCORES_ALONE, end_tokens, logits_processors, stopping_criteria
from .requests import Request


@dataclass
class Options:
    """What a call of `generate_batch` asks for, of all of its requests."""

    config: Any
    """As `generate` sees it, special tokens as tensors."""
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    """The caller's."""
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    """The caller's."""
    allowed: Callable[[int, Tensor], list[int]] | None = None
    """``prefix_allowed_tokens_fn``."""
    tokenizer: Any = None


class Chosen(NamedTuple):
    """What comes next in each of some rows."""

    tokens: Tensor
    """``[B]``."""
    log_probs: Tensor | None
    """``[B]``, of the distribution that was sampled from; ``None``: not asked for."""
    ends: Tensor
    """``[B]``, rows that end with it."""
    broken: Tensor
    """``[B]``, rows in which it means nothing: every token was ruled out, or a score is not a number."""


class Chooser:
    """Chooses the next tokens, with what `generate` would do with each request alone.

    Processors and criteria of the caller are copied for each request, so that what they keep they keep of one sequence; one that is to be
    shared can say so by a ``__deepcopy__`` that returns itself.

    Args:
        model: The causal LM.
        options: What was asked for.
        log_probs: Whether log-probs are wanted.
    """

    def __init__(self, model: Any, options: Options, log_probs: bool) -> None:
        self.model, self.options, self.log_probs = model, options, log_probs
        self.ends = None
        self.shared: list[Any] = []
        self.own: list[Any] = []
        for criterion in stopping_criteria(model, options.config, options.criteria, options.tokenizer):
            given = any(criterion is other for other in options.criteria)
            if isinstance(criterion, EosTokenCriteria) and not given:
                self.ends = end_tokens(options.config)
            elif given:
                self.own.append(criterion)
            elif not isinstance(criterion, MaxLengthCriteria):
                self.shared.append(criterion)
        first = self._processors(0, torch.ones(1, 1, dtype=torch.long, device=model.device), 2)
        self.by_scores = not options.processors and all(isinstance(part, OF_SCORES_ALONE) for part in first)
        self.of_all = first if self.by_scores else None

    @property
    def overdue(self) -> bool:
        """Whether the time of the call (``max_time``) is over, by the clock that ends its rows."""
        clocks = (criterion for criterion in self.shared if isinstance(criterion, MaxTimeCriteria))
        return any(time.time() - clock.initial_timestamp > clock.max_time for clock in clocks)

    @property
    def reads_tokens(self) -> bool:
        """Whether something looks at what a row has written."""
        return not self.by_scores or bool(self.shared or self.own)

    def begin(self, request: Request) -> None:
        """Make what belongs to one request alone."""
        if not self.by_scores:
            ids = torch.tensor([request.tokens], device=self.model.device)
            request.processors = self._processors(request.index, ids, ids.shape[1] + request.limit)
        request.criteria = StoppingCriteriaList([*self.shared, *copy.deepcopy(self.own)])

    def choose(
        self, logits: Tensor, requests: Sequence[Request], ids: Sequence[Tensor], draws: Tensor | None
    ) -> Chosen:
        """Choose a token for each row.

        Args:
            logits: ``[B, vocabulary]``, float32; a copy that may be written.
            requests: Of each row.
            ids: Of each row ``[1, N]``, its tokens so far, if anything looks at them.
            draws: ``[B]``, numbers in ``[0, 1)``; ``None``: the likeliest token is taken.
        """
        scores = self._processed(logits, requests, ids)
        weights = scores if draws is None else scores.softmax(dim=-1)
        tokens = weights.argmax(dim=-1) if draws is None else sample(weights, draws)
        log_probs = scores.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0] if self.log_probs else None
        ends = torch.zeros_like(tokens, dtype=torch.bool) if self.ends is None else torch.isin(tokens, self.ends)
        # Where one weight is not a number, so is that of the token that was taken.
        broken = ~(weights.gather(-1, tokens[:, None])[:, 0] > -torch.inf)
        return Chosen(tokens, log_probs, ends, broken)

    def stops(self, request: Request, ids: Tensor) -> Tensor:
        """A flag, whether a criterion ends the request whose tokens are ``ids [1, N]``; one that raises does."""
        try:
            found = [criterion(ids, None) for criterion in request.criteria or ()]
            flags = [torch.as_tensor(flag, device=ids.device).reshape(-1)[0].bool() for flag in found]
        except Exception as error:
            request.fail(error)
            flags = [torch.ones((), dtype=torch.bool, device=ids.device)]
        return torch.stack(flags).any()

    def _processed(self, logits: Tensor, requests: Sequence[Request], ids: Sequence[Tensor]) -> Tensor:
        if self.of_all is not None:
            for processor in self.of_all:
                logits = processor(None, logits)
            return logits
        rows = zip(requests, ids, logits.split(1), strict=True)
        return torch.cat([self._of_one(request, tokens, scores) for request, tokens, scores in rows])

    def _of_one(self, request: Request, ids: Tensor, logits: Tensor) -> Tensor:
        try:
            return request.processors(cast(Any, ids), cast(Any, logits)) if request.processors else logits
        except Exception as error:
            request.fail(error)
            return logits

    def _processors(self, index: int, ids: Tensor, longest: int) -> LogitsProcessorList:
        """For the request ``index`` with the prompt ``ids [1, N]``, which ends at ``longest`` tokens."""
        config, allowed = copy.copy(self.options.config), self.options.allowed
        config.max_length = longest
        # Each sequence is a request of its own; from transformers 5.24 on a processor expects all of a prompt in one batch.
        config.num_return_sequences = 1
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + ids.shape[1]
        return logits_processors(
            self.model,
            config,
            ids,
            copy.deepcopy(self.options.processors),
            None if allowed is None else partial(_allowed, allowed, index),
        )


def sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """``[B]``, tokens of ``probabilities [B, vocabulary]`` by ``draws [B]`` in ``[0, 1)``: the inverse of their sum from the first on.

    A row's token depends on its own numbers alone, which `torch.multinomial` with one generator for all rows does not grant.
    """
    total = probabilities.to(draws.dtype).cumsum(dim=-1)
    last = total[:, -1:]
    reached = (total <= draws[:, None] * last).sum(dim=-1)
    # Rounding may reach the sum itself, behind which there are tokens without probability alone.
    return torch.minimum(reached, (total < last).sum(dim=-1))


def _allowed(function: Callable[[int, Tensor], list[int]], index: int, row: int, ids: Tensor) -> list[int]:
    """``prefix_allowed_tokens_fn`` for a request alone in its batch, told which one of the call it is."""
    return function(index, ids)
