"""The base model: a small Llama, from random weights to a policy that solves the task with a full cache, by SFT."""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ..machine import ROOT
from ..small import Training, kept, small_llama
from .task import BOS, EOS, PAD, WORDS, Problems, make_problems, share_right, words

CHECKPOINTS = ROOT / "outputs" / "rl"
# (steps of a problem, questions, most optimizer steps): the table and recall are learned on short traces, then stretched. The
# model is for the last length alone: a last stage of mixed lengths (4 to 16 steps) took twice as long and ended at 42 % right.
# A stage ends when the mean share of right answers of its last 25 batches is good enough; the last one when that of tokens is,
# too: a generation follows its own trace, so a state that is wrong once is wrong from there on.
STAGES = ((4, 2, 1500), (8, 4, 800), (12, 6, 600), (16, 6, 800))
BATCH_TOKENS = 6144
DECAY_STEPS = 2500
GOOD_ENOUGH = 0.99
TOKENS_GOOD_ENOUGH = 0.999
ENOUGH = 0.97

log = logging.getLogger(__name__)


def new_model(layers: int = 2) -> LlamaForCausalLM:
    """A small Llama of this vocabulary."""
    return small_llama(len(WORDS), layers, 1024, bos=BOS, eos=EOS, pad=PAD)


def hits(logits: Tensor, problems: Problems) -> tuple[Tensor, Tensor]:
    """Whether each token of the completion ``[B, T]`` and each answer ``[B, F]`` is the most likely one."""
    prompt = problems.prompt_ids.shape[1]
    right = logits[:, prompt - 1 : -1].argmax(dim=-1).cpu() == problems.completion_ids.cpu()
    return right, right[:, problems.recalled + 1]


Stages = tuple[tuple[int, int, int], ...]


def train_base(seed: int, layers: int = 2, device: str = "cpu", stages: Stages = STAGES) -> LlamaForCausalLM:
    """SFT with a full cache on solutions, loss on completions; ``stages`` are (steps of a problem, questions, most steps of training).

    Raises:
        RuntimeError: It does not recall 97 % of the states of the longest problems.
    """
    torch.manual_seed(seed)
    model = new_model(layers).to(device).train()
    generator = torch.Generator().manual_seed(1000 + seed)
    training = Training(model.parameters(), rise=50, decay=DECAY_STEPS, floor=0.1, weight_decay=0.01, betas=(0.9, 0.98))
    done, began = 0, time.perf_counter()
    for steps, asked, most in stages:
        recent: deque[tuple[float, float]] = deque(maxlen=25)
        last = (steps, asked, most) == stages[-1]
        for _ in range(most):
            problems = make_problems(BATCH_TOKENS // (5 * steps + 3 * asked + 5), steps, asked, generator)
            output = model(problems.input_ids().to(device), labels=problems.labels().to(device), use_cache=False)
            training.step(output.loss)
            done += 1
            tokens, answers = hits(output.logits.detach(), problems)
            recent.append((float(answers.float().mean()), float(tokens.float().mean())))
            mean, mean_tokens = (sum(shares) / len(recent) for shares in zip(*recent, strict=True))
            if done % 100 == 0:
                log.info(
                    "SFT step %d (%d steps a problem): loss %.3f, tokens right %.3f, answers right %.3f, %.0f s",
                    *(done, steps, output.loss.detach(), tokens.float().mean(), mean, time.perf_counter() - began),
                )
            fluent = mean_tokens > TOKENS_GOOD_ENOUGH or not last
            if len(recent) == recent.maxlen and mean > GOOD_ENOUGH and fluent:
                break
    model.eval()
    if (right := solved(model, seed, stages=stages)) < ENOUGH:
        raise RuntimeError(
            f"The base model answers {right:.1%} of the questions with a full cache, which is too few to measure a bounded "
            "one with. Train it longer (STAGES in benchmarks/rl/model.py)."
        )
    return model


@torch.no_grad()
def solved(model: LlamaForCausalLM, seed: int, batch: int = 256, stages: Stages = STAGES) -> float:
    """Share of questions answered right with a full cache, by greedy decoding."""
    steps, asked, _ = stages[-1]
    problems = make_problems(batch, steps, asked, torch.Generator().manual_seed(5000 + seed))
    tokens = problems.completion_ids.shape[1]
    ids = model.generate(problems.prompt_ids.to(model.device), max_new_tokens=tokens, do_sample=False)
    completions = [words(row) for row in ids[:, problems.prompt_ids.shape[1] :].tolist()]
    rewards = share_right(completions, [words(row) for row in problems.completion_ids.tolist()])
    return sum(rewards) / len(rewards)


def base_model(
    seed: int, layers: int = 2, device: str = "cpu", folder: Path = CHECKPOINTS, stages: Stages = STAGES
) -> LlamaForCausalLM:
    """The base model of ``seed``, from ``folder`` if it is there."""
    return kept(folder / f"base-{layers}-layers-seed-{seed}", lambda: train_base(seed, layers, device, stages), device)
