"""Windows that are drawn in training: what is scored was generated under the same one, and nothing but training batches sees them."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import RecordedEvictions, WindowRange, find_seam
from tests.integrations.common import (
    COMPLETION,
    WINDOW,
    grpo_config,
    make_prompts_data,
    make_tokenizer,
    make_trl_base,
    pte_config,
    share_of_small_tokens,
)
from tests.integrations.test_grpo import first_log_ratio
from tests.integrations.trainers import MARKER, PROMPTS, arguments, completion_data

WINDOWS = [6, 8, 12, None]


def window_of(trainer):
    return find_seam(trainer.model).config("default").cache_window


def watch(trainer, monkeypatch):
    """Under which window every rollout and every loss ran, in order."""
    seen = []
    generate, loss = type(trainer)._generate, trainer.compute_loss

    def rollout(*args, **kwargs):
        seen.append(("rollout", window_of(trainer)))
        return generate(trainer, *args, **kwargs)

    def scored(*args, **kwargs):
        seen.append(("loss", window_of(trainer)))
        return loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "_generate", rollout)
    monkeypatch.setattr(trainer, "compute_loss", scored)
    return seen


def make_grpo(tmp_path, **fields):
    return GRPOTrainer(
        model=make_trl_base(),
        reward_funcs=share_of_small_tokens,
        args=grpo_config(tmp_path, **fields),
        train_dataset=make_prompts_data(),
        processing_class=make_tokenizer(),
        peft_config=pte_config(),
    )


def make_sft(tmp_path, model=None, **fields):
    return SFTTrainer(
        model=model or make_trl_base(),
        args=arguments(SFTConfig, tmp_path, **fields),
        train_dataset=completion_data(),
        eval_dataset=completion_data(),
        processing_class=make_tokenizer(),
        peft_config=pte_config(prompt_end=[MARKER]),
    )


@pytest.mark.parametrize(
    ("fields", "losses"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"steps_per_generation": 4}, 4),
        ({"steps_per_generation": 2, "num_iterations": 3}, 6),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 1),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}, 8),
    ],
    ids=str,
)
def test_a_rollout_is_scored_under_its_window(fields, losses, tmp_path, monkeypatch):
    trainer = make_grpo(tmp_path, max_steps=12, **fields)
    WindowRange.attach(trainer, WINDOWS)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    starts = [index for index, (kind, _) in enumerate(seen) if kind == "rollout"]
    parts = [seen[start:end] for start, end in zip(starts, [*starts[1:], len(seen)], strict=True)]
    assert all(len({window for _, window in part}) == 1 for part in parts)
    assert {len(part) - 1 for part in parts[:-1]} <= {losses}
    assert len({part[0][1] for part in parts}) > 1 or len(parts) < 4
    assert window_of(trainer) == WINDOW


def test_a_training_that_is_begun_again_scores_under_the_window_of_its_rollout(tmp_path, monkeypatch):
    # The trainer goes on with the rollout that it has, and so must the window.
    trainer = make_grpo(tmp_path, max_steps=6, steps_per_generation=4)
    WindowRange.attach(trainer, WINDOWS)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    trainer.train()
    current = None
    for kind, window in seen:
        current = window if kind == "rollout" else current
        assert window == current
    assert len({window for _, window in seen}) > 1


def test_only_the_last_range_counts(tmp_path):
    trainer = make_sft(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    WindowRange.attach(trainer, [6])
    WindowRange.attach(trainer, [12])
    windows = []
    trainer.add_callback(Looks(windows))
    trainer.train()
    assert window_of(trainer) == WINDOW
    assert json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())["cache_window"] == WINDOW
    assert sum(isinstance(callback, WindowRange) for callback in trainer.callback_handler.callbacks) == 1


def test_a_step_of_any_micro_batches_has_one_window(tmp_path, monkeypatch):
    # Four rows in micro-batches of one, three to a step: the last step of an epoch has one.
    trainer = make_sft(tmp_path, max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    WindowRange.attach(trainer, WINDOWS)
    seen, loss = [], trainer.compute_loss

    def scored(*args, **kwargs):
        seen.append((trainer.state.global_step, window_of(trainer)))
        return loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", scored)
    trainer.train()
    steps = {step: [window for at, window in seen if at == step] for step, _ in seen}
    assert [len(windows) for windows in steps.values()] == [3, 1] * 3
    assert all(len(set(windows)) == 1 for windows in steps.values())


def test_the_end_of_a_step_has_the_window_of_the_config(tmp_path):
    class Generates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(find_seam(kwargs["model"]).config("default").cache_window)

        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    seen = []
    trainer = make_sft(tmp_path, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    trainer.add_callback(Generates())
    WindowRange.attach(trainer, [6])
    trainer.train()
    assert set(seen) <= {WINDOW}
    assert window_of(trainer) == WINDOW


def test_importance_ratios_are_one(tmp_path, monkeypatch):
    trainer = make_grpo(tmp_path, max_steps=1)
    WindowRange.attach(trainer, [6])
    ratio, longest = first_log_ratio(trainer, monkeypatch)
    assert longest > WINDOW
    assert ratio < 1e-4


def test_distillation_too(tmp_path, monkeypatch):
    trainer = SelfDistillationTrainer(
        model=make_trl_base(),
        args=arguments(
            SelfDistillationConfig,
            tmp_path,
            max_steps=8,
            max_completion_length=COMPLETION,
            gradient_accumulation_steps=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=make_tokenizer(),
        peft_config=pte_config(prompt_end=[MARKER]),
    )
    WindowRange.attach(trainer, WINDOWS)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert [kind for kind, _ in seen] == ["rollout", "loss", "loss"] * 8
    assert all(len({window for _, window in seen[start : start + 3]}) == 1 for start in range(0, 24, 3))
    assert len({window for _, window in seen}) > 1


class Looks(TrainerCallback):
    """Which window the config has when it is evaluated or saved."""

    def __init__(self, windows):
        self.windows = windows

    def on_evaluate(self, args, state, control, **kwargs):
        self.windows.append(find_seam(kwargs["model"]).config("default").cache_window)


def test_evaluations_and_checkpoints_have_the_window_of_the_config(tmp_path):
    trainer = make_sft(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    WindowRange.attach(trainer, [6, 12])
    windows = []
    trainer.add_callback(Looks(windows))
    trainer.train()
    assert windows == [WINDOW] * 4
    saved = [json.loads((tmp_path / f"checkpoint-{step}" / "adapter_config.json").read_text()) for step in range(1, 5)]
    assert [config["cache_window"] for config in saved] == [WINDOW] * 4


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_training_that_goes_on_draws_what_it_would_have_drawn(tmp_path):
    whole = make_sft(tmp_path / "whole", max_steps=8, save_strategy="steps", save_steps=4)
    WindowRange.attach(whole, WINDOWS)
    whole.train()
    again = make_sft(tmp_path / "again", max_steps=8)
    WindowRange.attach(again, WINDOWS)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    fixed = make_sft(tmp_path / "fixed", max_steps=8)
    fixed.train()
    assert losses(fixed) != losses(whole)


def test_one_window_that_is_the_config_s_changes_nothing(tmp_path):
    plain = make_sft(tmp_path / "plain", max_steps=3, gradient_accumulation_steps=2)
    plain.train()
    ranged = make_sft(tmp_path / "ranged", max_steps=3, gradient_accumulation_steps=2)
    WindowRange.attach(ranged, [WINDOW])
    ranged.train()
    assert losses(ranged) == losses(plain)


def test_a_drawn_window_is_the_window_of_a_config(tmp_path):
    # A loss under a drawn window is that of an adapter whose config has it.
    drawn = make_sft(tmp_path / "drawn")
    WindowRange.attach(drawn, [12])
    drawn.train()
    torch.manual_seed(0)
    trainer = make_sft(tmp_path / "own")
    trainer.model.peft_config["default"].cache_window = 12
    trainer.train()
    assert losses(drawn) == losses(trainer)


def test_what_is_refused(tmp_path):
    trainer = make_sft(tmp_path)
    with pytest.raises(ValueError, match="`windows` must not be empty"):
        WindowRange.attach(trainer, [])
    with pytest.raises(ValueError, match="`cache_window` must be"):
        WindowRange.attach(trainer, [8, 2])
    assert window_of(trainer) == WINDOW
    for fields in ({"use_transformers_continuous_batching": True}, {"cache_implementation": "static"}):
        grpo = make_grpo(tmp_path, **fields)
        WindowRange.attach(grpo, [6, 8])
        with pytest.raises(ValueError, match="`windows` must not hold None with"):
            WindowRange.attach(grpo, [6, None])
    trainer.model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="must be active, and is disabled"):
        WindowRange.attach(trainer, WINDOWS)
    trainer.model.base_model.enable_adapter_layers()
    lora = SFTTrainer(
        model=make_trl_base(),
        args=arguments(SFTConfig, tmp_path),
        train_dataset=completion_data(),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    with pytest.raises(ValueError, match="must carry a PTE adapter"):
        WindowRange.attach(lora, WINDOWS)


def test_choices_are_recorded_under_drawn_windows_where_the_config_has_none(tmp_path):
    trainer = make_grpo(tmp_path, max_steps=6, logging_steps=1)
    config = trainer.model.peft_config["default"]
    config.eviction, config.cache_window = "key_diff", None
    with pytest.raises(ValueError, match="attach it after WindowRange"):
        RecordedEvictions.attach(trainer)
    WindowRange.attach(trainer, [WINDOW, None])
    RecordedEvictions.attach(trainer)
    trainer.train()
    shares = [row["pte/recorded_rows"] for row in trainer.state.log_history if "pte/recorded_rows" in row]
    assert shares
    assert set(shares) == {1.0}
    assert window_of(trainer) is None
