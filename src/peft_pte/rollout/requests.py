"""One request of `generate_batch`: what it asks for, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..eviction.records import Evictions


@dataclass
class Request:
    """A sequence to be written."""

    index: int
    """Among the requests of the call."""
    name: str
    tokens: tuple[int, ...] = ()
    """What it goes on from."""
    prompt: int = 0
    """Tokens of them that are prompt; those behind are thoughts already."""
    limit: int = 0
    """Tokens to write, at most."""
    too_long: str | None = None
    """Why it fails at its limit; ``None``: it may end there."""
    seed: int = 0
    """Of what is drawn for it."""
    processors: LogitsProcessorList | None = None
    """Its own; ``None``: those of all."""
    criteria: StoppingCriteriaList | None = None
    """Its own, beside those of all."""
    written: int = 0
    """Tokens so far."""
    error: Exception | None = None
    failed_at: int | None = None
    """Tokens that it had when it failed."""
    created: float = field(default_factory=time.perf_counter)
    started: float = -1.0
    ended: float = -1.0
    timestamps: list[float] | None = None
    generated: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    evictions: Evictions | None = None
    """What left while it was written, where that was asked for."""

    @property
    def over(self) -> bool:
        """Whether nothing more is written."""
        return self.ended >= 0

    def alike(self, other: Request) -> bool:
        """Whether the tokens of both stand in the same columns."""
        return len(self.tokens) == len(other.tokens) and self.prompt == other.prompt

    def draws(self) -> torch.Tensor:
        """``[limit]``, float64 in ``[0, 1)``: what its tokens are chosen by, the same wherever and beside whom it is written."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.limit, generator=generator, dtype=torch.float64)

    def note_token(self) -> None:
        """Note that a token was written."""
        self.written += 1
        if self.timestamps is not None:
            self.timestamps.append(time.perf_counter())

    def fail(self, error: Exception, written: int | None = None) -> None:
        """Note that it failed, with so many tokens ``written``; ``None``: with what it has."""
        if self.error is None:
            self.error, self.failed_at = error, self.written if written is None else written

    def finish(self, generated: Sequence[int] = (), log_probs: Sequence[float] = ()) -> None:
        """Note what was written; a request that has no room left fails."""
        count = len(generated) if self.failed_at is None else self.failed_at
        self.generated, self.log_probs, self.ended = generated[:count], log_probs[:count], time.perf_counter()
        self.timestamps = None if self.timestamps is None else self.timestamps[:count]
        if self.too_long is not None and count == self.limit:
            self.fail(ValueError(self.too_long))

    def output(self) -> Any:
        """What transformers' own `generate_batch` would give."""
        from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

        output: Any = GenerationOutput(
            request_id=self.name,
            prompt_ids=list(self.tokens),
            generated_tokens=list(self.generated),
            logprobs=list(self.log_probs),
            error=None if self.error is None else f"{type(self.error).__name__}: {self.error}",
            status=RequestStatus.FINISHED if self.error is None else RequestStatus.FAILED,
            created_time=self.created,
            lifespan=(self.started, self.ended),
            timestamps=self.timestamps,
        )
        if self.evictions is not None:
            output.evictions = self.evictions
        return output
