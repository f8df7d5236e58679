"""What the rollouts of a trainer took, and whether its first iteration was on-policy."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOTrainer

from .task import PAD


class _LogProbs(LogitsProcessor):
    """Keeps the distributions that tokens are sampled from."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at ``scores``, change nothing."""
        self.steps.append(scores.log_softmax(dim=-1))
        return scores


class RolloutWatch:
    """Within ``with``, times every rollout of ``trainer`` and compares the first with what the trainer scores.

    Attributes:
        seconds: Of each rollout.
        tokens: That each rollout generated, padding apart.
        max_log_ratio: Largest |log p(scored) - log p(sampled)| over the tokens of the first iteration: 0 if the gradient
            is that of the policy which generated.
        compared: Tokens that were compared.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.max_log_ratio = 0.0
        self.compared = 0
        self._trainer = trainer
        self._host = trainer.model.get_base_model()
        self._generate = self._host.generate
        self._score = trainer._get_per_token_logps_and_entropies
        self._sampled: dict[tuple[int, ...], Tensor] = {}

    def __enter__(self) -> RolloutWatch:
        self._host.generate = self._timed_generate
        self._trainer._get_per_token_logps_and_entropies = self._compared_score
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._host.generate
        del self._trainer._get_per_token_logps_and_entropies

    def _timed_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        first = not self.seconds
        recorder = _LogProbs()
        if first:
            kwargs["logits_processor"] = LogitsProcessorList([recorder])
        began = time.perf_counter()
        sequences: Tensor = self._generate(*args, **kwargs)
        if sequences.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        prompt = kwargs["input_ids"].shape[1]
        self.tokens.append(int((sequences[:, prompt:] != PAD).sum()))
        if first:
            steps = torch.stack(recorder.steps, dim=1)
            chosen = steps.gather(-1, sequences[:, prompt:, None])[..., 0]
            # The trainer shuffles what it generated: rows are found again by their tokens.
            self._sampled = {_key(tokens): row for tokens, row in zip(sequences, chosen, strict=True)}
        return sequences

    def _compared_score(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        result = self._score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self._sampled and len(self.seconds) == 1:
            for tokens, mask, scored in zip(input_ids, attention_mask.bool(), result[0].detach(), strict=True):
                kept = mask[-logits_to_keep:]
                difference = (scored - self._sampled[_key(tokens)][: len(scored)])[kept]
                self.max_log_ratio = max(self.max_log_ratio, float(difference.abs().max()))
                self.compared += int(kept.sum())
        return result


def _key(tokens: Tensor) -> tuple[int, ...]:
    return tuple(tokens[tokens != PAD].tolist())
