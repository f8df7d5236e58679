"""GRPO in a bounded cache, all of it: ``python examples/minimal_grpo.py [MODEL]``, a chat model of the hub or a folder."""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import peft_pte
from peft_pte import PTEConfig

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
ask = "What is {} + {}? Think step by step, then end with the number alone."
sums = [(a, 37 * a % 100) for a in range(100)]
rows = [{"prompt": [{"role": "user", "content": ask.format(a, b)}], "sum": str(a + b)} for a, b in sums]


def correct(completions, sum, **kwargs):
    """1 for a completion that ends with the sum."""
    return [float(text[-1]["content"].rstrip(" .").endswith(sum[i])) for i, text in enumerate(completions)]


config = PTEConfig(task_type="CAUSAL_LM", r=32, cache_window=64, prompt_end=peft_pte.prompt_end(tokenizer))
gpu = torch.cuda.is_available()
args = GRPOConfig("adapter", max_steps=20, max_completion_length=256, learning_rate=1e-3, bf16=gpu, use_cpu=not gpu)
trainer = GRPOTrainer(model, correct, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=config)
trainer.train()
trainer.save_model()
