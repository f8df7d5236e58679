"""The base model: a small Llama, pretrained with a full cache until it recalls every fact of a trace."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ..machine import ROOT
from ..small import Training, kept, small_llama
from .task import BOS, PAD, VOCABULARY, Traces, make_traces

CHECKPOINTS = ROOT / "outputs" / "memory"
# (thoughts, most steps): recall from attention appears on short traces, all at once after a plateau, and is then stretched
# over longer ones. A stage ends when the mean recall of its last 25 batches is good enough.
STAGES = ((48, 4000), (96, 800), (240, 600))
BATCH_TOKENS = 6144
DECAY_STEPS = 2300
GOOD_ENOUGH = 0.99
ENOUGH = 0.97

log = logging.getLogger(__name__)


def new_model(layers: int = 2) -> LlamaForCausalLM:
    """A small Llama of this vocabulary."""
    return small_llama(VOCABULARY, layers, 2048, bos=BOS, eos=None, pad=PAD)


def recall(logits: Tensor, traces: Traces) -> Tensor:
    """``[B, F]``, whether each fact's answer is the most likely token."""
    return _hit(logits, traces.input_ids, traces.asked)


def follows(logits: Tensor, traces: Traces) -> Tensor:
    """``[B, S]``, whether the running state is the most likely token where it is due."""
    return _hit(logits, traces.input_ids, traces.running)


def _hit(logits: Tensor, input_ids: Tensor, columns: Tensor) -> Tensor:
    row = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[row, columns].argmax(dim=-1) == input_ids[row, columns + 1]


def pretrain(seed: int, layers: int = 2, device: str = "cpu") -> LlamaForCausalLM:
    """Train a model on answers and running states with a full cache.

    Raises:
        RuntimeError: It does not recall 97 % of the facts of the longest traces.
    """
    torch.manual_seed(seed)
    model = new_model(layers).to(device).train()
    generator = torch.Generator().manual_seed(1000 + seed)
    training = Training(model.parameters(), rise=50, decay=DECAY_STEPS, floor=0.2, weight_decay=0.01, betas=(0.9, 0.98))
    step = 0
    for length, most in STAGES:
        recent: deque[float] = deque(maxlen=25)
        for _ in range(most):
            traces = make_traces(BATCH_TOKENS // length, length, generator).to(device)
            output = model(traces.input_ids, labels=traces.predictable, use_cache=False)
            training.step(output.loss)
            step += 1
            recent.append(float(recall(output.logits.detach(), traces).float().mean()))
            mean = sum(recent) / len(recent)
            if step % 100 == 0:
                log.info(
                    "pretraining step %d length %d loss %.3f recall %.3f", step, length, output.loss.detach(), mean
                )
            if len(recent) == recent.maxlen and mean > GOOD_ENOUGH:
                break
    model.eval()
    with torch.no_grad():
        traces = make_traces(64, STAGES[-1][0], generator).to(device)
        right = float(recall(model(traces.input_ids, use_cache=False).logits, traces).float().mean())
    if right < ENOUGH:
        raise RuntimeError(
            f"The base model recalls {right:.1%} of the facts with a full cache, which is too few to measure a bounded one "
            "with. Pretrain it longer (STAGES in benchmarks/memory/model.py)."
        )
    return model


def base_model(seed: int, layers: int = 2, device: str = "cpu", folder: Path = CHECKPOINTS) -> LlamaForCausalLM:
    """The pretrained model of ``seed``, from ``folder`` if it is there."""
    return kept(folder / f"base-{layers}-layers-seed-{seed}", lambda: pretrain(seed, layers, device), device)
