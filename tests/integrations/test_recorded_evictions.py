"""What left in a rollout leaves again when GRPOTrainer scores it; the trainer is TRL's own."""

from dataclasses import dataclass

import pytest
import torch
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from peft_pte import EvictionPolicy, register_eviction
from peft_pte.integrations.trl import RecordedEvictions, find_seam
from tests.integrations.common import (
    grpo_config,
    make_prompts_data,
    make_tokenizer,
    make_trl_base,
    pte_config,
    share_of_small_tokens,
)
from tests.integrations.test_grpo import first_log_ratio, make_trainer


@register_eviction("test_restless")
@dataclass(frozen=True)
class Restless(EvictionPolicy):
    """Chooses otherwise every time, as rounding would."""

    def score(self, window):
        return torch.rand(window.positions.shape, dtype=torch.float64)


def test_without_it_ratios_are_not_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config=pte_config(eviction="test_restless"), max_steps=1)
    ratio, _ = first_log_ratio(trainer, monkeypatch)
    assert ratio > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_ratio_is_one(family, tmp_path, monkeypatch):
    config = pte_config(eviction="test_restless")
    trainer = make_trainer(tmp_path, make_trl_base(family), config, max_steps=1)
    callback = RecordedEvictions.attach(trainer)
    args = trainer.args
    assert callback.rows == 2 * args.steps_per_generation * args.per_device_train_batch_size
    ratio, longest = first_log_ratio(trainer, monkeypatch)
    assert longest > 16
    assert ratio < 1e-4
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["pte/recorded_rows"] for entry in entries] == [1.0] * len(entries)
    assert find_seam(trainer.model).memory is None


def test_rows_that_are_refilled(tmp_path):
    # TRL's continuous batching, and old log-probs that are compared with new ones: of one policy, they are the same at first.
    trainer = GRPOTrainer(
        model=make_trl_base(),
        reward_funcs=share_of_small_tokens,
        args=grpo_config(tmp_path, max_steps=2, num_iterations=2, use_transformers_continuous_batching=True),
        train_dataset=make_prompts_data(),
        processing_class=make_tokenizer(),
        peft_config=pte_config(eviction="test_restless"),
    )
    RecordedEvictions.attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries
    assert all(entry["pte/recorded_rows"] == 1.0 for entry in entries)


def test_where_there_is_nothing_to_record(tmp_path):
    trainer = make_trainer(tmp_path, config=pte_config())
    with pytest.raises(ValueError, match="Nothing is chosen"):
        RecordedEvictions.attach(trainer)
    with pytest.raises(ValueError, match="`rows` must be at least 1"):
        RecordedEvictions(rows=0)
    trainer = SFTTrainer(
        model=make_trl_base(),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_length=40),
        train_dataset=make_prompts_data().rename_column("prompt", "text"),
        processing_class=make_tokenizer(),
        peft_config=pte_config(eviction="random", prompt_end=1),
    )
    with pytest.raises(ValueError, match="SFTTrainer rolls nothing out"):
        RecordedEvictions.attach(trainer)
