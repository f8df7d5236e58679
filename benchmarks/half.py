"""Does half precision keep the policy? Log-ratios of scoring and rollout by length, SmolLM2-135M-Instruct in bfloat16: ``python -m benchmarks.half``.

Each arm writes ``ROWS`` texts of ``TOKENS`` tokens at temperature 1 under its cache and scores what it wrote in one call. An importance ratio is the exponent
of the difference; in float32 it is 1 to 1e-4. Adapters are random and small (their writing side drawn, as a fresh adapter says nothing): what is
measured is rounding along the two ways of computing one policy, not what was learned. Results: ``results/half.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from peft_pte import PTEConfig

from .machine import RESULTS, ROOT, provenance
from .tables import table

ROWS, TOKENS, WINDOW, RANK, SCALE = 8, 512, 128, 32, 0.02
BINS = (128, 256, 384, 512)
PROMPT = "Tell a long story about a ship, a storm and two sisters."
FILE = RESULTS / "half.jsonl"
ARMS: dict[str, dict[str, Any] | None] = {
    "LoRA, full cache": None,
    "LoRA_c": {"state_update": "off"},
    "PTE, linear": {"encoder_attention": "linear"},
    "PTE, softmax": {"encoder_attention": "softmax"},
    "PTE, slots": {"encoder_attention": "slots"},
    "PTE, slots, `key_diff`": {"encoder_attention": "slots", "eviction": "key_diff"},
}


class _Sampled(LogitsProcessor):  # type: ignore[misc]
    """Keeps what every token is sampled from."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().log_softmax(dim=-1))
        return scores


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
    sampled = _Sampled()
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
    rollout = torch.stack(
        [step.gather(1, written[:, column, None])[:, 0] for column, step in enumerate(sampled.steps)], 1
    )
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


def measure(names: list[str], rows: int, tokens: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """One row per arm, dtype and part of the length."""
    sys.path.insert(0, str(ROOT / "examples"))
    from common import SMOLLM2, load_model

    for dtype in dtypes:
        for name in names:
            base, tokenizer = load_model(SMOLLM2, dtype)
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            began = time.perf_counter()
            found = log_ratios(adapted(base, ARMS[name]), ids.repeat(rows, 1), tokens)
            low = 0
            for high in [end for end in BINS if end <= tokens] or [tokens]:
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
                low = high


def report(file: Path = FILE) -> str:
    """The table: mean absolute log-ratio of a token by where it stands, and the spread of a sequence's sum."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    source, rows = lines[0], lines[1:]
    body = []
    for arm, dtype in dict.fromkeys((row["arm"], row["dtype"]) for row in rows):
        part = [row for row in rows if (row["arm"], row["dtype"]) == (arm, dtype)]
        cells = [f"{row['mean_abs']:.4f}" for row in part]
        worst = max(row["max_abs"] for row in part)
        body.append(
            [
                arm,
                dtype,
                *cells,
                f"{max(row['p99_abs'] for row in part):.3f}",
                f"{worst:.3f}",
                f"{part[-1]['sequence_std']:.3f}",
            ]
        )
    ends = [f"{low}-{high}" for low, high in dict.fromkeys((row["from"], row["to"]) for row in rows)]
    head = [
        "arm",
        "base",
        *(f"mean abs, tokens {end}" for end in ends),
        "99th percentile, worst part",
        "largest",
        "spread of a sequence's sum",
    ]
    return (
        f"{rows[0]['tokens'] // (rows[0]['to'] - rows[0]['from'])} texts of {rows[-1]['to']} tokens, window {WINDOW}; `{source['command']}`, {source['date'][:10]}; {source['cpu']}, no GPU; torch "
        f"{source['versions']['torch']}, transformers {source['versions']['transformers']}; commit {source['commit'][:12]}.\n\n"
        + table(head, body, left=2)
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write, line by line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half", description=__doc__)
    add = parser.add_argument
    add("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--dtype", nargs="+", default=["bfloat16"])
    add("--rows", type=int, default=ROWS)
    add("--tokens", type=int, default=TOKENS)
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        print(json.dumps(provenance(f"python -m benchmarks.half --rows {options.rows}")), file=file, flush=True)
        for row in measure(options.arm, options.rows, options.tokens, options.dtype):
            print(json.dumps(row), file=file, flush=True)
            print(row, flush=True)


if __name__ == "__main__":
    main()
