"""TRL's SFTTrainer, unmodified, with prompt masking."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.helpers import trainable
from tests.integrations.common import WINDOW, make_tokenizer, make_trl_base, pte_config


def make_data():
    # Prompts of different lengths; every completion counts up, several windows long.
    rows = []
    for start in range(3, 11):
        words = [f"w{3 + (start + step) % 50}" for step in range(3 * WINDOW + start)]
        rows.append({"prompt": " ".join(words[: start - 1]), "completion": " " + " ".join(words[start - 1 :])})
    return Dataset.from_list(rows)


def make_trainer(tmp_path, **fields):
    args = SFTConfig(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "bf16": False,
            "max_length": None,
            **fields,
        }
    )
    torch.manual_seed(5)
    return SFTTrainer(
        model=make_trl_base(),
        args=args,
        train_dataset=make_data(),
        processing_class=make_tokenizer(),
        peft_config=pte_config(init_weights=True),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_learns_to_count(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) / 3 < 0.8 * sum(found[:3]) / 3
    assert trainable(trainer.model)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_loss_is_that_of_rows_scored_alone(checkpointing, tmp_path):
    # Rows are padded right and their prompts end in different columns: the loss must not notice.
    trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
    model = trainer.model.train()
    features = [trainer.train_dataset[row] for row in range(4)]
    together = trainer.data_collator(features)
    batch_loss = trainer.compute_loss(model, together)
    total, tokens = 0.0, 0
    for feature in features:
        alone = trainer.data_collator([feature])
        count = int((alone["labels"][:, 1:] != -100).sum())
        total += trainer.compute_loss(model, alone).item() * count
        tokens += count
    assert batch_loss.item() == pytest.approx(total / tokens, rel=1e-5)


def test_packing_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    ids = torch.arange(3, 23)[None]
    positions = torch.cat([torch.arange(10), torch.arange(10)])[None]
    with pytest.raises(NotImplementedError, match="packing=False"):
        trainer.model(input_ids=ids, position_ids=positions, labels=ids, fused_lm_head=True)
