r"""Self-distillation in a fixed-size KV cache, before RL: the model on its full cache teaches itself in the bounded one, without labels.

The student writes answers under its window; the base model, the same weights with the adapter off, says on its full cache what it would have
written at each token; the student follows (reverse KL). Then `grpo_reasoning.py --adapter outputs/distill` reinforces what was distilled. With
`--windows 24 48 none` the window is drawn for each batch, and one adapter serves them all. `--lmbda 0` lets the teacher write, to start
with. On GPUs:

    accelerate launch --num_processes 8 examples/distill.py --model Qwen/Qwen2.5-3B-Instruct --dtype bfloat16 --task gsm_symbolic \
        --task-config '{}' --cache-window 768 --windows 768 1024 2048 none --max-completion-length 3072 --learning-rate 1e-4 --max-steps 300 \
        --micro-batch 2 --batch 16 --rank 32 --num-global-tokens 32
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import SMOLLM2, adapt, add_adapter_options, ask, complete_adapter_options, load_model, make_task, processes
from datasets import Dataset
from report import prepare_output, train, write_report

from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import WindowRange


def window(text: str) -> int | None:
    """A window of the command line."""
    return None if text == "none" else int(text)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--short` changes what is left open on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="hub id or local folder")
    add("--dtype", default="float32", help="of the base model; bfloat16 on a GPU")
    add("--task", default="chain_sum", help="of reasoning-gym; its questions alone are used")
    add("--task-config", default='{"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}', help="JSON")
    add("--num-problems", type=int, default=1000)
    add("--output-dir", type=Path, default=Path("outputs/distill"))
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--short", action="store_true", help="three small steps, to see that everything runs")
    add("--max-steps", type=int)
    add("--save-steps", type=int, default=10)
    add("--batch", type=int, help="rows per step and process")
    add("--micro-batch", type=int, help="rows that are scored together; must divide --batch")
    add("--max-completion-length", type=int, default=96, help="tokens")
    add("--windows", type=window, nargs="+", help="draw the window of each batch from these; none: the full cache")
    add("--divergence", type=float, default=1.0, help="1: reverse KL, 0: forward KL, between: a mixture")
    add("--lmbda", type=float, default=1.0, help="share of batches that the student writes")
    add("--temperature", type=float, default=1.0)
    add("--learning-rate", type=float, default=5e-4)
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute by segment")
    add_adapter_options(parser)
    add("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    small = {"max_steps": 3, "batch": 4, "micro_batch": 4}
    usual = {"max_steps": 30, "batch": 8, "micro_batch": 8}
    for name, value in (small if args.short else usual).items():
        setattr(args, name, getattr(args, name) or value)
    complete_adapter_options(args)
    return args


def main() -> None:
    """Distil, save the adapter, report."""
    args = parse_arguments()
    prepare_output(args.output_dir, args.resume)
    model, tokenizer = load_model(args.model, args.dtype)
    task = make_task(args.task, args.task_config, args.num_problems, args.seed)
    trainer = SelfDistillationTrainer(
        **adapt(model, tokenizer, args),
        train_dataset=Dataset.from_list([{"prompt": ask(entry["question"])} for entry in task]),
        processing_class=tokenizer,
        args=SelfDistillationConfig(
            output_dir=str(args.output_dir),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch,
            max_completion_length=args.max_completion_length,
            beta=args.divergence,
            lmbda=args.lmbda,
            # What the student does not write, the teacher does.
            seq_kd=True,
            temperature=args.temperature,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            bf16=args.dtype == "bfloat16",
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
    if args.windows:
        WindowRange.attach(trainer, args.windows)
    shown = {"loss": "loss {:.3f}", "pte/ratio_p5": "ratio p5 {:.2f}", "pte/evictions_per_sequence": "evictions {:.1f}"}
    seconds = train(trainer, shown, args.resume)
    if processes().is_main_process:
        history = trainer.state.log_history
        write_report(
            args.output_dir,
            f"Self-distillation with PTE: {Path(args.model).name}, {args.task}, window {args.cache_window}",
            args,
            history,
            [
                ("KL to the full cache [nats per token]", [("pte/kl", None)], 1.0),
                ("5th percentile of bounded / full", [("pte/ratio_p5", None)], 1.0),
                ("evictions per sequence", [("pte/evictions_per_sequence", None)], 1.0),
            ],
            seconds=seconds,
        )
        print(f"{seconds:.0f} s. Adapter, report.png and report.json are in {args.output_dir}.")


if __name__ == "__main__":
    main()
