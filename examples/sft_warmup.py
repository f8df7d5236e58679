"""Supervised warm-up in a fixed-size KV cache: a plain `trl.SFTTrainer` on worked sums longer than the window.

A problem of reasoning-gym's `chain_sum` becomes a prompt and a completion that adds one term per line. Only the completion
is scored, which is also how the model is told where the prompt ends: nothing of the prompt is ever evicted. Rows are
neither packed nor flattened, because each needs its own window. Problems that the training did not see are solved before
and after, in the same window.
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
from trl import SFTConfig, SFTTrainer


def parse_arguments() -> argparse.Namespace:
    """The command line; `--short` changes what is left open on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="hub id or local folder")
    add("--dtype", default="float32", help="of the base model; bfloat16 on a GPU")
    add("--task-config", default='{"min_terms": 5, "max_terms": 8, "min_digits": 1, "max_digits": 1}', help="JSON")
    add("--num-problems", type=int, default=1000)
    add("--held-out", type=int, help="problems that are solved before and after")
    add("--output-dir", type=Path, default=Path("outputs/sft"))
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--short", action="store_true", help="three small steps, to see that everything runs")
    add("--max-steps", type=int)
    add("--save-steps", type=int, default=10)
    add("--batch", type=int, help="rows per step and process")
    add("--micro-batch", type=int, help="rows that are scored together; must divide --batch")
    add("--learning-rate", type=float, default=1e-3)
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute by segment")
    add_adapter_options(parser)
    add("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    small = {"max_steps": 3, "batch": 4, "micro_batch": 4, "held_out": 4}
    usual = {"max_steps": 30, "batch": 8, "micro_batch": 8, "held_out": 24}
    for name, value in (small if args.short else usual).items():
        setattr(args, name, getattr(args, name) or value)
    complete_adapter_options(args)
    return args


def work_out(expression: str, answer: str) -> str:
    """`4 - 1 + 7` line by line."""
    total, *rest = expression.split()
    lines = [f"Start with {total}."]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = int(total) + int(term) if sign == "+" else int(total) - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = str(after)
    if total != answer:
        raise ValueError(f"`expression` must sum to {answer}, got {total} for {expression}. Use the task chain_sum.")
    return "\n".join([*lines, f"Answer: {answer}"])


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Any, indices: range) -> float:
    """Share of the problems that the model solves by itself, greedily, as their verifier judges."""
    prompts = [ask(task[index]["question"]) for index in indices]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    training = model.training
    written = model.eval().generate(**inputs, max_new_tokens=128, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    model.train(training)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return sum(verify(task, task[index], text) for index, text in zip(indices, texts, strict=True)) / len(texts)


def main() -> None:
    """Train, save the adapter, report."""
    args = parse_arguments()
    prepare_output(args.output_dir, args.resume)
    model, tokenizer = load_model(args.model, args.dtype)
    task = make_task("chain_sum", args.task_config, args.num_problems + args.held_out, args.seed)
    held_out = range(args.num_problems, args.num_problems + args.held_out)
    rows = [
        {
            "prompt": ask(entry["question"]),
            "completion": [
                {"role": "assistant", "content": work_out(entry["metadata"]["expression"], entry["answer"])}
            ],
        }
        for entry in (task[index] for index in range(args.num_problems))
    ]

    trainer = SFTTrainer(
        **adapt(model, tokenizer, args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(args.output_dir),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=args.gradient_checkpointing,
            packing=False,
            padding_free=False,
            logging_steps=1,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to=args.report_to,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
    )
    solver = trainer.accelerator.unwrap_model(trainer.model)
    before = accuracy(solver, tokenizer, task, held_out)
    shown = {
        "loss": "loss {:.3f}",
        "mean_token_accuracy": "tokens right {:.2f}",
        "pte/evictions_per_sequence": "evictions {:.1f}",
    }
    seconds = train(trainer, shown, args.resume)
    after = accuracy(solver, tokenizer, task, held_out)
    if processes().is_main_process:
        write_report(
            args.output_dir,
            f"Supervised warm-up with PTE: {Path(args.model).name}, chain_sum, window {args.cache_window}",
            args,
            trainer.state.log_history,
            [
                ("loss", [("loss", None)], 1.0),
                ("tokens right", [("mean_token_accuracy", None)], 1.0),
                ("evictions per sequence", [("pte/evictions_per_sequence", None)], 1.0),
            ],
            seconds=seconds,
            held_out_accuracy_before=before,
            held_out_accuracy_after=after,
        )
        print(f"{args.held_out} problems not seen in training: {before:.0%} solved before, {after:.0%} after.")
        print(f"{seconds:.0f} s. Adapter, report.png and report.json are in {args.output_dir}.")


if __name__ == "__main__":
    main()
