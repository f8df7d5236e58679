"""One GRPO step: scoring and backward at growing lengths, and whole steps of TRL's trainer at a small size.

Log-probs come from TRL's fused head, as in its trainers. The head works in tiles of 32,768 columns of the vocabulary for
all tokens at once, which no adapter changes; so the peak is also taken with the head on one token. Without trl there is
nothing to measure, and the rows say so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..common.accounting import PeakMemory
from ..common.arithmetic import kv_bytes_per_token
from ..common.models import LINEARS, SHAPES, pte_config, shape_config, shaped_base, with_lora, with_pte
from ..common.session import Row, Session, memory_bytes, release
from ..common.timing import Spread, compare, synchronize

PEERS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "pte": {},
    "pte_whole_segments": {"recompute_layers": False},
    "pte_offload": {"offload": True},
}
"""By name the further fields of `PTEConfig`; LoRA has its own full attention and layers checkpointed."""
GROWTH = 1.5
"""A step of twice the length is expected to take at most twice this."""


@dataclass(frozen=True)
class ScoringCase:
    """Scoring and backward of one micro-batch."""

    shape: str
    batch: int
    completion: int
    window: int
    prompt: int
    rank: int
    kind: str = "scoring and backward"


@dataclass(frozen=True)
class StepCase:
    """Whole steps of `GRPOTrainer`: rollout, scoring, backward."""

    shape: str
    batch: int
    completion: int
    window: int
    prompt: int
    rank: int
    steps: int = 3
    kind: str = "whole step"


def cases(session: Session) -> list[ScoringCase]:
    """Lengths by shape, short ones first."""
    if not session.gpu:
        lengths, sizes = (64, 256, 512), {"window": 64, "prompt": 32, "rank": 8}
        return [ScoringCase(shape, 1, length, **sizes) for shape in session.shapes for length in lengths]
    sizes = {"window": 1024, "prompt": 256, "rank": 32}
    # The first shape over all lengths, the others as far as their models leave memory and time.
    return [
        ScoringCase(shape, 1, length, **sizes)
        for index, shape in enumerate(session.shapes)
        for length in ((1024, 4096, 16384, 65536) if index == 0 else (1024, 4096))
    ]


def step_cases(session: Session) -> list[StepCase]:
    """One small model, so that the rollout does not take all of the time."""
    if session.gpu:
        return [StepCase("tiny", 8, 512, 128, 16, 16)]
    return [StepCase("tiny", 4, 96, 32, 16, 8)]


def measure(session: Session) -> Iterator[Row]:
    """One row per case and peer."""
    peers = [peer for peer in PEERS if session.wants(peer)]
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed. Use pip install 'peft-pte[train]'."
        for case in (*step_cases(session), *cases(session)):
            yield from (session.skipped("train", case, peer, reason) for peer in peers)
        return
    for step_case in step_cases(session):
        for peer in session.missing("train", step_case, PEERS):
            yield session.attempt("train", step_case, peer, partial(_measure_step, session, step_case, peer))
            release(session.device)
    by_shape: dict[str, list[ScoringCase]] = {}
    for case in cases(session):
        by_shape.setdefault(case.shape, []).append(case)
    for group in by_shape.values():
        for peer in peers:
            yield from _scoring(session, group, peer)
            release(session.device)


def _scoring(session: Session, group: list[ScoringCase], peer: str) -> Iterator[Row]:
    """``peer`` over the lengths of one shape."""
    model, expected = None, 0.0
    for case in group:
        if session.has("train", case, peer):
            continue
        reason = _does_not_fit(session, case) or session.budget.refuses(expected)
        if reason is None and model is None:
            try:
                model = _adapted(session, case, peer)
            except NotImplementedError as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            yield session.skipped("train", case, peer, reason)
            continue
        start = time.monotonic()
        row = session.attempt("train", case, peer, partial(_measure_scoring, session, model, case), expected)
        yield row
        longer = [other.completion for other in group if other.completion > case.completion]
        if longer:
            # Three runs at least: to warm up, for the time, for the memory of the backbone.
            expected = 3 * GROWTH * (time.monotonic() - start) / _runs(row) * min(longer) / case.completion
        release(session.device)


def _runs(row: Row) -> int:
    return row["seconds"]["repeats"] + 2 if "seconds" in row else 1


def _does_not_fit(session: Session, case: ScoringCase) -> str | None:
    """Why the weights, and keys and values or layer inputs of the completion, exceed the memory, whatever the peer."""
    memory = memory_bytes(session.device)
    if memory is None:
        return None
    config: Any = shape_config(case.shape)
    held = min(kv_bytes_per_token(config, 2), 2 * config.hidden_size * config.num_hidden_layers)
    needed = 2 * SHAPES[case.shape].parameters + case.batch * (case.prompt + case.completion) * held
    return None if needed < memory else f"does not fit: needs more than {needed / 2**30:.0f} GiB"


def pte_fields(case: ScoringCase | StepCase, **extra: Any) -> dict[str, Any]:
    """Fields of the PTE config of ``case``.

    Raises:
        NotImplementedError: This version's `PTEConfig` lacks one of ``extra``.
    """
    from peft_pte import PTEConfig

    known = {field.name for field in dataclasses.fields(PTEConfig)}
    missing = sorted(set(extra) - known)
    if missing:
        raise NotImplementedError(
            f"PTEConfig has no field {', '.join(f'`{name}`' for name in missing)} in this version"
        )
    return {"r": case.rank, "num_global_tokens": case.rank, "cache_window": case.window, **extra}


def _adapted(session: Session, case: ScoringCase, peer: str) -> Any:
    from trl.trainer.utils import add_fused_lm_head

    extra = PEERS[peer]
    fields = None if extra is None else pte_fields(case, **extra)
    base = shaped_base(case.shape, session.device, session.dtype)
    add_fused_lm_head(base)
    if fields is None:
        model = with_lora(base, case.rank, LINEARS, autocast=False)
    else:
        model = with_pte(base, autocast=False, **fields)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _measure_scoring(session: Session, model: Any, case: ScoringCase) -> Row:
    columns = case.prompt + case.completion
    rows = torch.randint(1, model.config.vocab_size, (case.batch, columns), device=session.device)
    labels = rows.clone()
    labels[:, : case.prompt] = -100

    def step() -> None:
        model.zero_grad()
        grpo_loss(model(input_ids=rows, labels=labels, fused_lm_head=True).log_probs).backward()

    step()  # Warms up, and makes the gradients, which are there in every later step.
    synchronize(session.device)
    if session.gpu:
        torch.cuda.reset_peak_memory_stats()
    repeats = 3 if case.completion <= 16 * case.window else 1
    spread = compare({"step": step}, session.device, repeats=repeats, warmup=0, budget=session.budget)["step"]
    peak = torch.cuda.max_memory_allocated() if session.gpu else None
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "seconds": spread.row(),
        "tokens_per_second": case.batch * case.completion / spread.median,
        "peak_bytes": peak,
        "peak_bytes_above_weights": _peak(session, step) if peak is None else peak - weights,
        "peak_bytes_of_backbone": _peak(session, partial(_backbone_step, model, rows, case.prompt)),
    }


def _backbone_step(model: Any, rows: torch.Tensor, prompt: int) -> None:
    """Forward and backward with the head on the last token alone."""
    model.zero_grad()
    bounded = {"prompt_length": prompt} if hasattr(model.base_model, "new_cache") else {}
    model(input_ids=rows, logits_to_keep=1, use_cache=False, **bounded).logits.float().square().mean().backward()


def _peak(session: Session, step: Callable[[], None]) -> int:
    """The most bytes alive in ``step``, above the weights."""
    if not session.gpu:
        with PeakMemory() as memory:
            step()
        return memory.peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize(session.device)
    return torch.cuda.max_memory_allocated() - before


def grpo_loss(log_probs: torch.Tensor) -> torch.Tensor:
    """The clipped loss of the first update after a rollout: ratios are 1 and their gradients are not; advantages +-1."""
    advantages = torch.ones_like(log_probs[:, :1])
    advantages[::2] = -1.0
    ratio = (log_probs - log_probs.detach()).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def _measure_step(session: Session, case: StepCase, peer: str) -> Row:
    from .steps import train

    extra = PEERS[peer]
    if extra is None:
        from peft import LoraConfig

        config: Any = LoraConfig(
            task_type="CAUSAL_LM", r=case.rank, lora_alpha=2 * case.rank, target_modules=sorted(LINEARS)
        )
    else:
        config = pte_config(**pte_fields(case, **extra))
    if session.gpu:
        torch.cuda.reset_peak_memory_stats()
    base = shaped_base(case.shape, session.device, torch.float32)
    seconds = train(base, config, case.batch, case.completion, case.steps)
    spread = Spread.of(seconds[1:])
    return {
        "seconds": spread.row(),
        "tokens_per_second": case.batch * case.completion / spread.median,
        "peak_bytes": torch.cuda.max_memory_allocated() if session.gpu else None,
        "peak_bytes_above_weights": None,
    }
