"""Reload an adapter in a fresh process and think far past the window, beside the base model on its own cache.

Prints an answer, then tokens per second and bytes of cache at several lengths. For that comparison the end of the text is
suppressed (`min_new_tokens`), so that both models write the same number of tokens.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ask, cache_bytes
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, DynamicCache, StoppingCriteria, StoppingCriteriaList

import peft_pte  # Registers the method with peft.


class Meter(StoppingCriteria):
    """Stops nothing: notes the time and the bytes of the cache after each token."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.readings: list[tuple[float, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Take a reading."""
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.readings.append((time.perf_counter(), cache_bytes(self.cache)))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure(model: Any, inputs: Any, cache: Any, tokens: int, marks: list[int]) -> list[tuple[float, int]]:
    """Write ``tokens`` tokens; ``(tokens per second since the mark before, bytes)`` at each mark."""
    meter = Meter(cache)
    model.generate(
        **inputs,
        past_key_values=cache,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([meter]),
    )
    figures, before = [], 1  # The first token comes out of the prompt.
    for mark in marks:
        (start, _), (end, held) = meter.readings[before - 1], meter.readings[mark - 1]
        figures.append(((mark - before) / (end - start), held))
        before = mark
    return figures


def main() -> None:
    """Answer, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", type=Path, required=True, help="folder that grpo_reasoning.py or sft_warmup.py wrote"
    )
    parser.add_argument("--prompt", default="Solve the following multiplication: 7 * 8.")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", help="bfloat16 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.max_new_tokens < 16:
        parser.error(
            f"`--max-new-tokens` must be at least 16, got {args.max_new_tokens}. Use 1024 to see a difference."
        )
    if not (args.adapter / "adapter_config.json").exists():
        parser.error(f"`--adapter` must hold an adapter, got {args.adapter}. Run grpo_reasoning.py first.")

    transformers.utils.logging.disable_progress_bar()
    model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=args.dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    inputs = tokenizer.apply_chat_template(
        ask(args.prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(args.device)
    prompt_tokens, config = inputs["input_ids"].shape[1], model.peft_config["default"]

    answer = model.generate(**inputs, max_new_tokens=min(256, args.max_new_tokens), do_sample=False)[0, prompt_tokens:]
    print(f"{args.prompt}\n\n{tokenizer.decode(answer, skip_special_tokens=True)}\n")
    print(f"({len(answer)} tokens through a window of {config.cache_window})\n")

    marks = sorted({max(2, args.max_new_tokens * share // 16) for share in (1, 2, 4, 8, 16)})
    rows = []
    for cache, context in (
        (peft_pte.PTECache(model.config, config), nullcontext()),
        (DynamicCache(config=model.config), model.disable_adapter()),
    ):
        with context:
            rows.append(measure(model, inputs, cache, args.max_new_tokens, marks))
    print(f"End of text suppressed, prompt of {prompt_tokens} tokens, {args.dtype} on {args.device}.")
    print(f"{'tokens':>7} | {'PTE':>9} {'cache':>10} | {'base':>9} {'cache':>10} | {'ratio':>5}")
    for mark, (rate, held), (base_rate, base_held) in zip(marks, *rows, strict=True):
        print(
            f"{mark:>7} | {rate:>5.1f}/s   {held / 1e6:>7.2f} MB | {base_rate:>5.1f}/s   {base_held / 1e6:>7.2f} MB | "
            f"{base_held / held:>4.1f}x"
        )


if __name__ == "__main__":
    main()
