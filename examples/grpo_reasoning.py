r"""GRPO in a fixed-size KV cache: a plain `trl.GRPOTrainer`, a `PTEConfig`, and a task that verifies itself.

The defaults train SmolLM2-135M-Instruct on one-digit products on two CPU cores in minutes: 96 tokens of thought through a
window of 24. The learning rate of 2e-4 is for so few steps (at 1e-3 the model stopped ending its answers within ten); the
paper uses 1e-5 for serious runs, which are the same script with other arguments:

    accelerate launch --num_processes 8 examples/grpo_reasoning.py --model Qwen/Qwen2.5-3B-Instruct --dtype bfloat16 \
        --task gsm_symbolic --task-config '{}' --cache-window 768 --max-completion-length 3072 --min-thought 0 \
        --temperature 1.0 --learning-rate 1e-5 --max-steps 1000 --micro-batch 4 --batch 64 --num-generations 8 \
        --rank 32 --num-global-tokens 32

An interrupted run continues from its last checkpoint with `--resume`. To distil first, as examples/distill.py does, and go on from there:
`--adapter outputs/distill`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import (
    SMOLLM2,
    adapt,
    add_adapter_options,
    ask,
    complete_adapter_options,
    load_model,
    make_task,
    processes,
    verify,
)
from datasets import Dataset
from report import prepare_output, train, write_report
from trl import GRPOConfig, GRPOTrainer


def parse_arguments() -> argparse.Namespace:
    """The command line; `--short` changes what is left open on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="hub id or local folder")
    add("--dtype", default="float32", help="of the base model; bfloat16 on a GPU")
    add("--task", default="products", help="of reasoning-gym; set PYTHONHASHSEED where the task depends on it")
    add("--task-config", default='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}', help="JSON")
    add("--num-problems", type=int, default=1000)
    add("--output-dir", type=Path, default=Path("outputs/grpo"))
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--short", action="store_true", help="three small steps, to see that everything runs")
    add("--max-steps", type=int)
    add("--save-steps", type=int, default=5)
    add("--batch", type=int, help="completions per step and process")
    add("--micro-batch", type=int, help="completions that are scored together; must divide --batch")
    add("--num-generations", type=int, help="completions per problem")
    add("--rows", type=int, help="rollout rows, refilled as they end: fewer than --batch, where lengths differ much")
    add("--max-completion-length", type=int, default=96, help="tokens")
    add("--min-thought", type=int, default=48, help="tokens; an answer after fewer is not rewarded")
    add("--temperature", type=float, default=0.7)
    add(
        "--beta",
        type=float,
        default=0.0,
        help="weight of the KL: to the base on its full cache, or to --adapter as it came",
    )
    add("--learning-rate", type=float, default=2e-4)
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute by segment")
    add_adapter_options(parser)
    add("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    small = {"max_steps": 3, "batch": 4, "micro_batch": 4, "num_generations": 4}
    usual = {"max_steps": 20, "batch": 8, "micro_batch": 8, "num_generations": 4}
    for name, value in (small if args.short else usual).items():
        setattr(args, name, getattr(args, name) or value)
    complete_adapter_options(args)
    return args


def make_reward(task: Any, min_thought: int) -> Any:
    """The task's verifier on answers that come after enough thought."""

    def reward(
        completions: list[Any], completion_ids: list[list[int]], problem: list[int], **kwargs: Any
    ) -> list[float]:
        return [
            verify(task, task[index], messages[-1]["content"]) if len(ids) >= min_thought else 0.0
            for messages, ids, index in zip(completions, completion_ids, problem, strict=True)
        ]

    return reward


def main() -> None:
    """Train, save the adapter, report."""
    args = parse_arguments()
    prepare_output(args.output_dir, args.resume)
    model, tokenizer = load_model(args.model, args.dtype)
    task = make_task(args.task, args.task_config, args.num_problems, args.seed)
    rows = [{"prompt": ask(entry["question"]), "problem": index} for index, entry in enumerate(task)]

    trainer = GRPOTrainer(
        **adapt(model, tokenizer, args),
        reward_funcs=make_reward(task, args.min_thought),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(args.output_dir),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch,
            num_generations=args.num_generations,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            beta=args.beta,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            # TRL casts the whole model, adapter included, before it refills rows with `bf16`: the base has its dtype already.
            bf16=args.dtype == "bfloat16" and not args.rows,
            use_transformers_continuous_batching=bool(args.rows),
            transformers_continuous_batching_config={"max_requests_per_batch": args.rows} if args.rows else None,
            gradient_checkpointing=args.gradient_checkpointing,
            logging_steps=1,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to=args.report_to,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
    )
    shown = {
        "reward": "reward {:.2f}",
        "completions/mean_length": "tokens {:.0f}",
        "pte/evictions_per_sequence": "evictions {:.1f}",
        "pte/tokens_per_second": "{:.0f} tokens/s",
    }
    # As the demo took: 444 s for 20 steps of 8 completions.
    measured = 22.0 * args.batch / 8 if args.model == SMOLLM2 and not torch.cuda.is_available() else None
    seconds = train(trainer, shown, args.resume, measured)
    if processes().is_main_process:
        history = trainer.state.log_history
        summary = summarize(history)
        write_report(
            args.output_dir,
            f"GRPO with PTE: {Path(args.model).name}, {args.task}, window {args.cache_window}",
            args,
            history,
            [
                ("reward", [("reward", None)], 1.0),
                ("cache [MB]", [("pte/cache_bytes", "PTE"), ("pte/full_cache_bytes", "full cache, same tokens")], 1e-6),
                ("evictions per sequence", [("pte/evictions_per_sequence", None)], 1.0),
            ],
            seconds=seconds,
            **summary,
        )
        print(*(f"{name}: {value:.4g}" for name, value in summary.items()), sep="\n")
        print(f"{seconds:.0f} s. Adapter, report.png and report.json are in {args.output_dir}.")


def summarize(history: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of a run in a few numbers: means over its first and its last quarter."""
    steps = [row for row in history if "reward" in row]
    quarter = max(1, len(steps) // 4)

    def mean(name: str, rows: list[dict[str, Any]]) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return {
        "reward_first_quarter": mean("reward", steps[:quarter]),
        "reward_last_quarter": mean("reward", steps[-quarter:]),
        "evictions_per_sequence": mean("pte/evictions_per_sequence", steps),
        "cache_bytes_over_full_cache": mean("pte/cache_bytes", steps) / mean("pte/full_cache_bytes", steps),
    }


if __name__ == "__main__":
    main()
