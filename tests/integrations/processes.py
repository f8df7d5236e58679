"""One run of a trainer, as torchrun starts it in each of two processes: ``torchrun ... processes.py KIND FOLDER STEPS [--resume]``."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch import distributed
from torch.utils.data import SequentialSampler
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_pte.seam import Seam
from tests.integrations.common import WINDOW, make_tokenizer, make_trl_base, pte_config, share_of_small_tokens

ROWS = 16


def arguments(folder, steps, **fields):
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        **fields,
    }


class InOrder(SFTTrainer):
    """Rows in the order of the data: the second process gets those that never evict."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def sft(folder, steps):
    # Batches of two for each of two processes in turn.
    lengths = [3 * WINDOW, 2 * WINDOW + 3, WINDOW - 2, 3] * (ROWS // 4)
    words = [" ".join(f"w{3 + (7 * row + place) % 50}" for place in range(n)) for row, n in enumerate(lengths)]
    data = Dataset.from_dict({"prompt": ["w3 w4"] * ROWS, "completion": words})
    return InOrder(
        model=make_trl_base("llama"),
        peft_config=pte_config(),
        train_dataset=data,
        processing_class=make_tokenizer(),
        args=SFTConfig(**arguments(folder, steps)),
    )


def grpo(folder, steps):
    return GRPOTrainer(
        model=make_trl_base("llama"),
        peft_config=pte_config(prompt_end=2),
        reward_funcs=share_of_small_tokens,
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7", "w8 w9"] * 4}),
        processing_class=make_tokenizer(),
        args=GRPOConfig(**arguments(folder, steps, num_generations=4, max_completion_length=3 * WINDOW)),
    )


def main():
    kind, folder, steps, *options = sys.argv[1:]
    torch.set_num_threads(1)
    trainer = {"sft": sft, "grpo": grpo}[kind](folder, int(steps))
    assert distributed.is_initialized()
    assert distributed.get_world_size() == 2
    trainer.train(resume_from_checkpoint=bool(options) or None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    mine = {
        "weights": {name: value.detach() for name, value in model.named_parameters() if value.requires_grad},
        "evictions": Seam.require(model.base_model.model).statistics.drain().get("evictions_per_sequence"),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step": trainer.state.global_step,
    }
    torch.save(mine, Path(folder) / f"rank-{distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
