r"""Before GRPO, and not in the paper: an arm's adapter distils the model on its full cache, on the same problems, without their answers.

    accelerate launch --config_file examples/paper/configs/ddp_8.yaml examples/paper/distill.py \
        --model qwen2.5-3b --arm pte --output-dir outputs/paper/qwen2.5-3b-pte-distilled
    accelerate launch --config_file examples/paper/configs/ddp_8.yaml examples/paper/train.py \
        --model qwen2.5-3b --arm pte --adapter outputs/paper/qwen2.5-3b-pte-distilled --output-dir outputs/paper/qwen2.5-3b-pte

Under a window LoRA_c and Global-Only can be distilled as PTE can: compare like with like. `--windows 768 1024 2048 none` draws the window of each batch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from arms import ARMS, CACHE_WINDOW, GLOBAL_TOKENS, MAX_COMPLETION_LENGTH, MAX_GRAD_NORM, RANK, STATE_UPDATE, model_name
from train import DATASET, adapted, load_problems, world_size
from transformers import AutoTokenizer

from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import PTECallback, WindowRange


def window(text: str) -> int | None:
    """A window of the command line."""
    return None if text == "none" else int(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. What the paper does not say is [ours]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="qwen2.5-3b, qwen2.5-7b, r1-llama-8b, a hub id or a local folder")
    add("--arm", required=True, choices=[arm for arm in ARMS if arm in STATE_UPDATE], help="one with a window")
    add("--dataset", default=DATASET, help="hub id, or a local JSON, JSON-lines or parquet file in its schema")
    add("--output-dir", type=Path, required=True)
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--batch", type=int, default=64, help="completions per step, of all processes together")
    add("--micro-batch", type=int, default=2, help="completions scored together, per process")
    add("--max-completion-length", type=int, default=MAX_COMPLETION_LENGTH, help="tokens")
    add("--max-prompt-length", type=int, default=1024, help="tokens; problems that are longer are left out")
    add("--cache-window", type=int, default=CACHE_WINDOW, help="thoughts the cache holds")
    add("--windows", type=window, nargs="+", help="draw the window of each batch from these; none: the full cache")
    add("--rank", type=int, default=RANK)
    add("--num-global-tokens", type=int, default=GLOBAL_TOKENS)
    add("--state-address", default="key", choices=["key", "value"], help="key remembers more: docs/evidence.md")
    add("--encoder-attention", default="linear", choices=["linear", "softmax", "slots"], help="linear is the paper's")
    add("--learning-rate", type=float, default=1e-4)
    add("--max-steps", type=int, default=300)
    add("--save-steps", type=int, default=20)
    add("--dtype", default="bfloat16", help="of the base model")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.adapter = None
    return args


def make_trainer(args: argparse.Namespace) -> SelfDistillationTrainer:
    """The trainer of an arm.

    Raises:
        ValueError: A step cannot be shared out.
    """
    share, rest = divmod(args.batch, world_size())
    if rest or share % args.micro_batch:
        raise ValueError(
            f"`--micro-batch` must divide its share of `--batch`, got {args.micro_batch} for {args.batch} completions on {world_size()} processes. "
            "Use powers of two."
        )
    # Before the model is loaded, because FSDP and DeepSpeed want to know how.
    config = SelfDistillationConfig(
        output_dir=str(args.output_dir),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=share // args.micro_batch,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="linear",
        max_steps=args.max_steps,
        bf16=args.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.gradient_checkpointing,
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=args.report_to,
        seed=args.seed,
    )
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_name(args.model), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = SelfDistillationTrainer(
        **adapted(args, tokenizer),
        train_dataset=load_problems(args.dataset, tokenizer, args.max_prompt_length),
        processing_class=tokenizer,
        args=config,
    )
    PTECallback.attach(trainer)
    if args.windows:
        WindowRange.attach(trainer, args.windows)
    return trainer


def main(argv: list[str] | None = None) -> None:
    """Distil, save the adapter and what was logged."""
    args = parse_arguments(argv)
    trainer = make_trainer(args)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        (args.output_dir / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        print(f"{trainer.state.global_step} steps, {time.perf_counter() - start:.0f} s. Adapter in {args.output_dir}.")


if __name__ == "__main__":
    main()
