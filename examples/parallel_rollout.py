"""A rollout over processes, each of which writes its share of the prompts in rows that are refilled; one file holds what all of them wrote.

``accelerate launch --num_processes 8 examples/parallel_rollout.py PROMPTS.jsonl OUTPUT.jsonl --adapter ADAPTER``, a line of the prompts being
``{"prompt": [{"role": "user", "content": TEXT}]}``, or ``{"prompt": TEXT}`` with the chat template applied. On a CPU: ``ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun
--nproc_per_node 2 examples/parallel_rollout.py ...``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import peft_pte as peft_pte  # registers the method with peft


def rollout(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[list[list[int]], list[float]]:
    """Write a sequence for each of ``prompts``, the same in every process; what was written, in their order, and the seconds that each process took.

    Args:
        model: With an active adapter, the same in every process.
        prompts: Token ids, without padding.
        config: How to write.
        rows: Of each process; ``None``: as many as fit.
        seed: Of what is drawn. Processes draw apart, so another number of them draws otherwise.
        **options: Further ones of ``generate_batch``.
    """
    state = PartialState()
    # Every so many, as prompts that stand together are often alike in length.
    mine = prompts[state.process_index :: state.num_processes]
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=rows, seed=seed * state.num_processes + state.process_index
    )
    start = time.perf_counter()
    outputs = model.generate_batch(mine, config, batching, **options) if mine else {}
    seconds = time.perf_counter() - start
    written = gather_object([[output.generated_tokens for output in outputs.values()]])
    # Place n of all prompts is place n // processes of its process.
    ordered = [written[place % state.num_processes][place // state.num_processes] for place in range(len(prompts))]
    return ordered, gather_object([seconds])


def main() -> None:
    """Read prompts, write a line for each with what the model made of it, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--adapter", default="adapter", help="a folder, or an id of the hub")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="of each process (default: as many as fit)")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    state = Accelerator()
    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter).to(state.device)
    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    asked = [json.loads(line)["prompt"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    ids = [
        # A rendered template holds its special tokens.
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in asked
        for _ in range(options.samples)
    ]
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    written, seconds = rollout(model, ids, config, options.rows, options.seed)
    if state.is_main_process:
        with options.output.open("w", encoding="utf-8") as file:
            for place, tokens in enumerate(written):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                record = {"prompt": asked[place // options.samples], "completion": text, "tokens": len(tokens)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        total, slowest = sum(map(len, written)), max(seconds)
        idle = 1 - sum(seconds) / (slowest * len(seconds))
        print(
            f"{len(written)} sequences, {total} tokens in {slowest:.1f} s on {len(seconds)} processes ({total / slowest:.0f} a second); they "
            f"waited for the slowest {idle:.0%} of the time"
        )
    state.end_training()


if __name__ == "__main__":
    main()
