"""A few steps of TRL's `GRPOTrainer` on a random model: a tokenizer made on the spot, prompts of words, a synthetic reward."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from ..common.models import words_tokenizer


def train(base: Any, config: Any, batch: int, completion: int, steps: int) -> list[float]:
    """Seconds of each of ``steps`` steps of ``batch`` completions as TRL logs them: rollout, scoring, backward. Every completion has its full length.

    Args:
        base: A causal LM.
        config: The peft config of the adapter.
        batch: Completions a step, which are one group.
        completion: Tokens.
        steps: At least 2; the first one warms up.
    """
    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, base.config.vocab_size)}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=base,
            peft_config=config,
            reward_funcs=_reward,
            train_dataset=Dataset.from_dict({"prompt": ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11"] * (batch * steps)}),
            processing_class=words_tokenizer(words, "<pad>", "<eos>", "<pad>"),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                num_generations=batch,
                max_completion_length=completion,
                generation_kwargs={"min_new_tokens": completion},
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=base.device.type == "cpu",
                bf16=False,
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["step_time"] for row in trainer.state.log_history if "step_time" in row]


def _reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of words with an odd number, which differs from row to row."""
    words = [completion.split() for completion in completions]
    return [sum(int(word[1:]) % 2 for word in row if word[1:].isdigit()) / max(len(row), 1) for row in words]
