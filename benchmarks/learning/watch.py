"""What happens in each step: seconds, tokens, and how far scoring is from the distribution that was sampled from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class SampledLogProbs(LogitsProcessor):  # type: ignore[misc]
    """The log-prob of each sampled token; one distribution is held at a time."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._distribution: Tensor | None = None
        self._taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called before each token is sampled, with the tokens so far."""
        self._take(input_ids)
        self._distribution = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Of all sampled tokens, ``[B, T]``."""
        self._take(sequences)
        return torch.stack(self._taken, dim=1)

    def _take(self, input_ids: Tensor) -> None:
        if self._distribution is not None:
            self._taken.append(self._distribution.gather(-1, input_ids[:, -1:])[:, 0])


class Watch(TrainerCallback):  # type: ignore[misc]
    """Watches every step of a `GRPOTrainer`; ``rows`` has one entry per step.

    An entry: ``seconds`` of the whole step, ``rollout_seconds`` of `generate`, ``tokens`` sampled (the end of a completion
    counts), ``compared`` tokens of them whose log-probs were compared, and ``max_log_ratio``, the largest absolute
    difference between the log-prob that scoring gives a token and the one that it was sampled with. Each batch is used once,
    so its importance ratios are on-policy and should be 1.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._sampled: dict[tuple[int, ...], Tensor] = {}
        self._row: dict[str, float] = {}
        self._mark = 0.0

    def attach(self, trainer: Any) -> None:
        """Watch ``trainer``: its `generate` and its scoring pass through here from now on."""
        self._device = trainer.accelerator.device
        self._host = trainer.model.get_base_model()
        self._generate = self._host.generate
        self._host.generate = self._generating(self._generate)
        trainer._get_per_token_logps_and_entropies = self._scoring(trainer._get_per_token_logps_and_entropies)
        trainer.add_callback(self)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let the model generate unwatched again."""
        self._host.generate = self._generate

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Finish a row when what was computed is there."""
        self._synchronize()
        now = time.perf_counter()
        self.rows.append({"seconds": now - self._mark, **self._row})
        self._mark, self._row = now, {}
        self._sampled.clear()

    def _generating(self, generate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(*args: Any, attention_mask: Tensor, generation_config: Any = None, **kwargs: Any) -> Tensor:
            if generation_config is None:  # An evaluation on the way, and no rollout.
                return generate(*args, attention_mask=attention_mask, **kwargs)
            recorder = SampledLogProbs(generation_config.temperature)
            self._synchronize()
            start = time.perf_counter()
            sequences = generate(
                *args,
                generation_config=generation_config,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([recorder]),
                **kwargs,
            )
            log_probs = recorder.finish(sequences)
            self._synchronize()
            seconds = time.perf_counter() - start
            ends = generation_config.eos_token_id
            ends = set(ends if isinstance(ends, list) else [ends])
            tokens = 0
            prompts = zip(sequences.tolist(), attention_mask.tolist(), log_probs, strict=True)
            for row, mask, sampled in prompts:
                prompt = [token for token, kept in zip(row, mask, strict=False) if kept]
                completion = row[len(mask) :]
                length = next((i + 1 for i, token in enumerate(completion) if token in ends), len(completion))
                tokens += length
                self._sampled[(*prompt, *completion[:length])] = sampled[:length]
            self._row["rollout_seconds"] = self._row.get("rollout_seconds", 0.0) + seconds
            self._row["tokens"] = self._row.get("tokens", 0) + tokens
            return sequences

        return recorded

    def _scoring(self, score: Callable[..., Any]) -> Callable[..., Any]:
        def compared(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kw: Any):
            result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kw)
            if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
                return result  # The reference of `beta`, which sampled nothing.
            for row, mask, log_probs in zip(input_ids, attention_mask.bool(), result[0].detach(), strict=True):
                # The trainer shuffles what it sampled: a row is found again by its tokens.
                sampled = self._sampled[tuple(row[mask].tolist())]
                difference = float((log_probs[: len(sampled)].float() - sampled).abs().max())
                if not math.isfinite(difference):
                    # `max` would pass over a NaN.
                    raise FloatingPointError(
                        f"The log ratio of sampled tokens is {difference}: scoring or sampling gave no finite log-probs. "
                        "Lower the learning rate, or use float32."
                    )
                self._row["max_log_ratio"] = max(self._row.get("max_log_ratio", 0.0), difference)
                self._row["compared"] = self._row.get("compared", 0) + len(sampled)
            return result

        return compared

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Start counting the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Most memory since :func:`reset_peak`, weights included.

    On a GPU the allocator's; on a CPU the resident memory of the process (Linux), ``None`` where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if not CLEAR.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
