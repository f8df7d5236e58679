r"""GRPO of one arm of the paper's protocol: a plain `trl.GRPOTrainer` on DAPO-Math-17k, rewarded by math-verify.

    accelerate launch --config_file examples/paper/configs/ddp_8.yaml examples/paper/train.py \
        --model qwen2.5-3b --arm pte --output-dir outputs/paper/qwen2.5-3b-pte

The defaults are the paper's hyper-parameters (`arms.py`). Whatever the number of processes, a step sees `--batch` completions:
what does not fit at once is generated and scored in portions. `--resume` continues from the last checkpoint. `distill.py` before it, then
`--adapter`, is not the paper's protocol: such records are listed apart.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from arms import (
    ARMS,
    CACHE_WINDOW,
    GLOBAL_BATCH,
    GLOBAL_TOKENS,
    LEARNING_RATE,
    MAX_COMPLETION_LENGTH,
    MAX_GRAD_NORM,
    NUM_GENERATIONS,
    RANK,
    adapter_config,
    model_name,
    short_name,
)
from datasets import Dataset, load_dataset
from peft import PeftConfig, PeftModel
from records import FULL, RESULTS, changed_arguments, check_adapter, differing, path_of, write
from tasks.grading import is_correct
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import peft_pte
from peft_pte.integrations.trl import PTECallback

DATASET = "BytedTsinghua-SIA/DAPO-Math-17k"


# Choices of the machine and of the seed; all other arguments decide what is learned.
MACHINE = {"output_dir", "results", "resume", "rollout_batch", "micro_batch", "save_steps", "gradient_checkpointing"}
MACHINE |= {"report_to", "seed", "model", "arm", "dataset", "rows"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``changed`` is what in it is not the protocol's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="qwen2.5-3b, qwen2.5-7b, r1-llama-8b, a hub id or a local folder")
    add("--arm", required=True, choices=ARMS)
    add("--dataset", default=DATASET, help="hub id, or a local JSON, JSON-lines or parquet file in its schema")
    add("--output-dir", type=Path, required=True)
    add("--results", type=Path, default=RESULTS, help="where table.py looks")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--adapter", type=Path, help="go on from this adapter of the arm, as distill.py leaves it")
    add(
        "--rows",
        type=int,
        help="rollout rows per process, refilled as they end (generate_batch); fewer than --rollout-batch",
    )
    add("--batch", type=int, default=GLOBAL_BATCH, help="completions per step, of all processes together")
    add("--rollout-batch", type=int, default=64, help="completions generated together, per process")
    add("--micro-batch", type=int, default=4, help="completions scored together, per process")
    add("--num-generations", type=int, default=NUM_GENERATIONS, help="completions per problem")
    add("--max-completion-length", type=int, default=MAX_COMPLETION_LENGTH, help="tokens")
    add("--max-prompt-length", type=int, default=1024, help="tokens; problems that are longer are left out")
    add("--cache-window", type=int, default=CACHE_WINDOW, help="thoughts the cache holds; of no meaning to --arm lora")
    add("--rank", type=int, default=RANK)
    add("--num-global-tokens", type=int, default=GLOBAL_TOKENS)
    add("--state-address", default="key", choices=["key", "value"], help="key remembers more: docs/evidence.md")
    add("--encoder-attention", default="linear", choices=["linear", "softmax", "slots"], help="linear is the paper's")
    add("--learning-rate", type=float, default=LEARNING_RATE)
    add("--max-steps", type=int, default=-1, help="-1: one epoch")
    add("--save-steps", type=int, default=20)
    add("--dtype", default="bfloat16", help="of the base model")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.changed = changed_arguments(args, parser, sorted(set(vars(args)) - MACHINE))
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not args.resume:
        parser.error(f"`--output-dir` must be new or empty, got {args.output_dir}. Use --resume to continue a run.")
    return args


def batch_plan(batch: int, processes: int, rollout_batch: int, micro_batch: int) -> dict[str, int]:
    """How ``processes`` share a step of ``batch`` completions, as fields of ``GRPOConfig``.

    Raises:
        ValueError: The numbers do not divide each other.
    """
    share, rest = divmod(batch, processes)
    rollout_batch = min(rollout_batch, share)
    for field, value, whole in (("rollout-batch", rollout_batch, share), ("micro-batch", micro_batch, rollout_batch)):
        if rest or value < 1 or whole % value:
            raise ValueError(
                f"`--{field}` must divide its share of `--batch`, got {value} for {whole} ({batch} completions on "
                f"{processes} processes). Use powers of two."
            )
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": share // micro_batch,
        "steps_per_generation": rollout_batch // micro_batch,
    }


def load_problems(name: str, tokenizer: Any, max_prompt_length: int) -> Dataset:
    """DAPO-Math-17k as ``prompt`` (messages) and ``solution``, each problem once, without what is too long."""
    suffix = Path(name).suffix.lstrip(".")
    if suffix:
        rows = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=name, split="train")
    else:
        rows = load_dataset(name, split="train")
    # The published file holds every problem about a hundred times.
    first: dict[str, int] = {}
    for position, extra in enumerate(rows["extra_info"]):
        first.setdefault(extra["index"], position)
    rows = rows.select(first.values()).map(
        lambda row: {"solution": row["reward_model"]["ground_truth"]},
        remove_columns=[column for column in rows.column_names if column != "prompt"],
    )

    def fits(row: dict[str, Any]) -> bool:
        encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        return len(encoded["input_ids"]) <= max_prompt_length

    return rows.filter(fits)


def correctness(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """1 for a right answer, 0 for all else."""
    return [float(is_correct(m[-1]["content"], gold)) for m, gold in zip(completions, solution, strict=True)]


def adapted(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """``model`` and, where its adapter is a fresh one of the arm, ``peft_config``.

    Raises:
        ValueError: ``--adapter`` was trained as another arm, or on another model, or with other fields than are asked for.
    """
    model = AutoModelForCausalLM.from_pretrained(model_name(args.model), dtype=args.dtype)
    config = adapter_config(
        args.arm,
        rank=args.rank,
        num_global_tokens=args.num_global_tokens,
        cache_window=args.cache_window,
        state_address=args.state_address,
        encoder_attention=args.encoder_attention,
        prompt_end=peft_pte.prompt_end(tokenizer),
    )
    if args.adapter is None:
        return {"model": model, "peft_config": config}
    found = PeftConfig.from_pretrained(str(args.adapter))
    check_adapter(args.arm, args.model, found)
    if changed := differing(found, config):
        raise ValueError(
            f"`--adapter` must be what the other arguments say, got {changed}. Give the arguments that it was trained with."
        )
    return {"model": PeftModel.from_pretrained(model, str(args.adapter), is_trainable=True)}


def make_trainer(args: argparse.Namespace) -> GRPOTrainer:
    """The trainer of an arm.

    Raises:
        ValueError: A step would not see ``args.batch`` completions.
    """
    # Before the model is loaded, because FSDP and DeepSpeed want to know how.
    config = GRPOConfig(
        output_dir=str(args.output_dir),
        **batch_plan(args.batch, world_size(), args.rollout_batch, args.micro_batch),
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        num_train_epochs=1,
        max_steps=args.max_steps,
        # TRL casts the whole model, adapter included, before it refills rows with `bf16`: the base has its dtype already.
        bf16=args.dtype == "bfloat16" and not args.rows,
        use_transformers_continuous_batching=bool(args.rows),
        transformers_continuous_batching_config={"max_requests_per_batch": args.rows} if args.rows else None,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.gradient_checkpointing,
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=args.report_to,
        seed=args.seed,
    )
    # The trainer seeds itself after it has made the adapter.
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_name(args.model), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = GRPOTrainer(
        **adapted(args, tokenizer),
        reward_funcs=correctness,
        train_dataset=load_problems(args.dataset, tokenizer, args.max_prompt_length),
        processing_class=tokenizer,
        args=config,
    )
    together = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if together * trainer.accelerator.num_processes != args.batch:
        raise ValueError(
            f"`--batch` must be what a step sees, got {args.batch} for {together} completions on each of "
            f"{trainer.accelerator.num_processes} processes. Start the script with `accelerate launch`."
        )
    if args.arm != "lora":
        PTECallback.attach(trainer)
    return trainer


def world_size() -> int:
    """Processes of this run, as its launcher says before anything distributed is set up."""
    return int(os.environ.get("WORLD_SIZE", 1))


def main(argv: list[str] | None = None) -> None:
    """Train, save the adapter, leave a record for ``table.py``."""
    args = parse_arguments(argv)
    trainer = make_trainer(args)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume or None)
    seconds = time.perf_counter() - start
    trainer.save_model()
    if not trainer.accelerator.is_main_process:
        return
    cuda = torch.cuda.is_available()
    record = {
        "kind": "training",
        "model": short_name(args.model),
        "arm": args.arm,
        "cache_window": None if args.arm == "lora" else args.cache_window,
        "data": {} if args.dataset == DATASET else {"dapo": args.dataset},
        "changed": args.changed,
        "seed": args.seed,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type),
        "machine": torch.cuda.get_device_name() if cuda else "CPU",
        # Of the main process.
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "seconds": seconds,
        "versions": {module.__name__: module.__version__ for module in (peft_pte, torch, transformers, peft, trl)},
        "history": trainer.state.log_history,
    }
    identity = {name: record[name] for name in ("model", "arm", "cache_window", "data", "changed", "seed")}
    window = FULL if args.arm == "lora" else args.cache_window
    file = path_of(args.results, identity, "train", record["model"], args.arm, window)
    write(file, record)
    print(f"{trainer.state.global_step} steps, {seconds:.0f} s. Adapter in {args.output_dir}, record in {file}.")


if __name__ == "__main__":
    main()
