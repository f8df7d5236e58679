"""What the tests of trainers share: a tokenizer made on the spot, data, and short runs."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

from peft_pte import PTEConfig
from tests.cases import VOCABULARY, make_base

WINDOW = 8
COMPLETION = 3 * WINDOW
PROMPT_WORDS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11"]


def make_tokenizer():
    """One token a word, ``w3`` to ``w60``."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_prompts_data(copies=8):
    return Dataset.from_dict({"prompt": PROMPT_WORDS * copies})


def make_trl_base(family="llama", seed=0):
    torch.manual_seed(seed)
    # An end of sequence that random models sample now and then: completions of different lengths.
    attention = "eager" if family == "gemma2" else "sdpa"
    base = make_base(family, eos_token_id=1, attn_implementation=attention)
    base.generation_config.eos_token_id = 1
    base.generation_config.pad_token_id = 0
    return base


def pte_config(**fields):
    return PTEConfig(
        **{
            "task_type": "CAUSAL_LM",
            "r": 4,
            "num_global_tokens": 5,
            "cache_window": WINDOW,
            "init_weights": False,
            **fields,
        }
    )


def share_of_small_tokens(completions, **kwargs):
    """A reward that any model can move: how many words are below w30."""
    words = [completion.split() for completion in completions]
    return [sum(int(word[1:]) < 30 for word in row if word[1:].isdigit()) / max(len(row), 1) for row in words]


def grpo_config(tmp_path, **fields):
    return GRPOConfig(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": COMPLETION,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
            **fields,
        }
    )
