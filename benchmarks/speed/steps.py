"""A few steps of TRL's `GRPOTrainer` on a random model: a tokenizer made on the spot, prompts of words, a synthetic reward."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Each step ends when its results are there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def train(base: Any, config: Any, batch: int, completion: int, steps: int) -> list[float]:
    """Seconds of each of ``steps`` steps of ``batch`` completions; every completion has its full length.

    Args:
        base: A causal LM.
        config: The peft config of the adapter.
        batch: Completions a step, which are one group.
        completion: Tokens.
        steps: At least 2; the first one warms up.
    """
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=base,
            peft_config=config,
            reward_funcs=_reward,
            train_dataset=Dataset.from_dict({"prompt": ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11"] * (batch * steps)}),
            processing_class=_tokenizer(base.config.vocab_size),
            callbacks=[watch],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                num_generations=batch,
                max_completion_length=completion,
                generation_kwargs={"min_new_tokens": completion},
                max_steps=steps,
                logging_steps=steps,
                save_strategy="no",
                report_to=[],
                use_cpu=base.device.type == "cpu",
                bf16=False,
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
    return [after - before for before, after in zip([start, *watch.marks], watch.marks, strict=False)]


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a word, ``w3`` to the last of the vocabulary."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of words with an odd number, which differs from row to row."""
    words = [completion.split() for completion in completions]
    return [sum(int(word[1:]) % 2 for word in row if word[1:].isdigit()) / max(len(row), 1) for row in words]
