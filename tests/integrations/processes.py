"""One run of a trainer, as torchrun or accelerate starts it in each of two processes: ``processes.py KIND FOLDER STEPS [--resume] [--checkpoints] [--base FOLDER]``."""

import argparse
import os
from pathlib import Path

import torch
import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_pte.host.compat import CHECKPOINTED
from peft_pte.seam import Seam
from tests.integrations.common import WINDOW, make_tokenizer, make_trl_base, pte_config, share_of_small_tokens

ROWS = 16


def read_flag(name):
    return os.environ.get(name, "false").lower() == "true"


SHARDED = read_flag("ACCELERATE_USE_FSDP")
PARTITIONED = read_flag("ACCELERATE_USE_DEEPSPEED")


def count_the_cpu_as_a_gpu():
    """accelerate turns from several GPUs to FSDP, never from several CPUs. What it does afterwards is its own."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def let_the_cpu_compute_in_bf16():
    """transformers takes bf16 without a GPU only with `use_cpu`, with which accelerate would not partition."""
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def arguments(options, **fields):
    return {
        "output_dir": options.folder,
        "max_steps": options.steps,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        # With it accelerate neither shards nor partitions.
        "use_cpu": not (SHARDED or PARTITIONED),
        "ddp_backend": "gloo" if PARTITIONED else None,
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        "gradient_checkpointing": options.checkpoints,
        "logging_steps": 1,
        "disable_tqdm": True,
        **fields,
    }


class InOrder(SFTTrainer):
    """Rows in the order of the data: the second process gets those that never evict."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def sft(options):
    # Batches of two for each of two processes in turn.
    lengths = [3 * WINDOW, 2 * WINDOW + 3, WINDOW - 2, 3] * (ROWS // 4)
    words = [" ".join(f"w{3 + (7 * row + place) % 50}" for place in range(n)) for row, n in enumerate(lengths)]
    data = Dataset.from_dict({"prompt": ["w3 w4"] * ROWS, "completion": words})
    return InOrder(
        model=options.base or make_trl_base("llama"),
        peft_config=pte_config(),
        train_dataset=data,
        processing_class=make_tokenizer(),
        args=SFTConfig(**arguments(options)),
    )


def grpo(options):
    return GRPOTrainer(
        model=options.base or make_trl_base("llama"),
        peft_config=pte_config(prompt_end=2),
        reward_funcs=share_of_small_tokens,
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7", "w8 w9"] * 4}),
        processing_class=make_tokenizer(),
        args=GRPOConfig(**arguments(options, num_generations=4, max_completion_length=3 * WINDOW)),
    )


def whole(weight):
    """All of a weight of which a process holds a part. Every process has to ask."""
    if isinstance(weight, DTensor):
        return weight.detach().full_tensor()
    if PARTITIONED:
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["sft", "grpo"])
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--base", help="folder of the base model, which the trainer opens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if SHARDED:
        count_the_cpu_as_a_gpu()
    if SHARDED or PARTITIONED:
        let_the_cpu_compute_in_bf16()
    trainer = {"sft": sft, "grpo": grpo}[options.kind](options)
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    model = trainer.accelerator.unwrap_model(trainer.model)
    mine = {
        "weights": {
            name.replace(CHECKPOINTED, ""): whole(value)
            for name, value in model.named_parameters()
            if value.requires_grad
        },
        "evictions": Seam.require(model.base_model.model).statistics.drain().get("evictions_per_sequence"),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step": trainer.state.global_step,
        "kind": str(trainer.accelerator.distributed_type.value),
        "precision": trainer.accelerator.mixed_precision,
        "processes": trainer.accelerator.num_processes,
    }
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    torch.save(mine, Path(options.folder) / f"rank-{rank}.pt")
    # gloo's threads abort a process that leaves while they wait for another.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
