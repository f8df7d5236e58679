"""Does half precision keep the policy? Log-ratios of scoring and rollout by length, SmolLM2-135M-Instruct in bfloat16.

Each arm writes ``ROWS`` texts of ``TOKENS`` tokens at temperature 1 under its cache and scores what it wrote in one call. An importance ratio is the exponent
of the difference; in float32 it is 1 to 1e-4. Adapters are random and small (their writing side drawn, as a fresh adapter says nothing): what is
measured is rounding along the two ways of computing one policy, not what was learned.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LogitsProcessorList

from examples.common import SMOLLM2, load_model
from peft_pte import PTEConfig

from ..common.records import Record
from ..common.session import Session
from ..learning.watch import SampledLogProbs

ROWS, TOKENS, WINDOW, RANK, SCALE = 8, 512, 128, 32, 0.02
BINS = (128, 256, 384, 512)
PROMPT = "Tell a long story about a ship, a storm and two sisters."
ARMS: dict[str, dict[str, Any] | None] = {
    "LoRA, full cache": None,
    "LoRA_c": {"state_update": "off"},
    "PTE, linear": {"encoder_attention": "linear"},
    "PTE, softmax": {"encoder_attention": "softmax"},
    "PTE, slots": {"encoder_attention": "slots"},
    "PTE, slots, `key_diff`": {"encoder_attention": "slots", "eviction": "key_diff"},
}

KEY = ("arm", "dtype", "from", "to")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--tokens", type=int, default=TOKENS)


def adapted(base: Any, fields: dict[str, Any] | None) -> Any:
    """``base`` with a random adapter; the same numbers in every arm, where shapes allow."""
    torch.manual_seed(0)
    if fields is None:
        config: Any = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    else:
        sizes = {"r": RANK, "num_global_tokens": RANK, "cache_window": WINDOW}
        config = PTEConfig(task_type="CAUSAL_LM", **{**sizes, **fields})
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "pte_up" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=SCALE / math.sqrt(RANK))
    return model


@torch.no_grad()
def log_ratios(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """``[B, tokens]``, log-probability in one scoring call minus that in the rollout."""
    sampled = SampledLogProbs(1.0)
    torch.manual_seed(1)
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        logits_processor=LogitsProcessorList([sampled]),
    )
    written = whole[:, ids.shape[1] :]
    rollout = sampled.finish(whole)
    bounded = hasattr(model.peft_config["default"], "cache_window")
    known = {"prompt_length": ids.shape[1]} if bounded else {}
    scored = []
    for row in range(len(whole)):
        logits = (
            model(input_ids=whole[row : row + 1], use_cache=False, **known).logits[:, ids.shape[1] - 1 : -1].float()
        )
        # What was sampled from had its end of text forbidden.
        logits[..., model.generation_config.eos_token_id] = -math.inf
        scored.append(logits.log_softmax(dim=-1).gather(-1, written[row, :, None][None])[0, :, 0])
    return torch.stack(scored) - rollout


def measure(session: Session) -> Iterator[Record]:
    """One record per arm, dtype and part of the length."""
    rows, tokens = (2, 64) if session.quick else (session.options.rows, session.options.tokens)
    ends = [end for end in BINS if end <= tokens] or [tokens]
    for dtype in session.options.dtype:
        for name in session.options.arm:
            if session.results.has({"arm": name, "dtype": dtype, "from": ([0, *ends])[-2], "to": ends[-1]}):
                continue
            base, tokenizer = load_model(SMOLLM2, dtype)
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            began = time.perf_counter()
            found = log_ratios(adapted(base, ARMS[name]), ids.repeat(rows, 1), tokens)
            for low, high in zip([0, *ends], ends, strict=False):
                part = found[:, low:high].flatten()
                yield {
                    "arm": name,
                    "dtype": dtype,
                    "from": low,
                    "to": high,
                    "tokens": part.numel(),
                    "mean": float(part.mean()),
                    "mean_abs": float(part.abs().mean()),
                    "p99_abs": float(part.abs().quantile(0.99)),
                    "max_abs": float(part.abs().max()),
                    "sequence_std": float(found[:, :high].sum(dim=1).std()) if rows > 1 else None,
                    "seconds": time.perf_counter() - began,
                }
