"""GRPO in a bounded cache on a base in 4 bits (QLoRA's nf4): ``python examples/qlora.py [MODEL]``, a chat model of the hub or a folder.

Weights take a quarter of bfloat16's bytes, the cache does not grow, and only the adapter learns. Needs ``pip install 'peft-pte[train,quantized]'``.
Scoring and rollout round the same weights; what that does to ratios stands in docs/scaling.md.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

import peft_pte
from peft_pte import PTEConfig
from peft_pte.integrations.trl import PTECallback

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
gpu = torch.cuda.is_available()
dtype = torch.bfloat16 if gpu else torch.float32
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=dtype, device_map=0 if gpu else "cpu")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
ask = "What is {} + {}? Think step by step, then end with the number alone."
sums = [(a, 37 * a % 100) for a in range(100)]
rows = [{"prompt": [{"role": "user", "content": ask.format(a, b)}], "sum": str(a + b)} for a, b in sums]


def correct(completions, sum, **kwargs):
    """1 for a completion that ends with the sum."""
    return [float(text[-1]["content"].rstrip(" .").endswith(sum[i])) for i, text in enumerate(completions)]


config = PTEConfig(task_type="CAUSAL_LM", r=32, cache_window=64, prompt_end=peft_pte.prompt_end(tokenizer))
args = GRPOConfig(
    "adapter-4bit", max_steps=20, max_completion_length=256, learning_rate=1e-3, bf16=gpu, use_cpu=not gpu
)
trainer = GRPOTrainer(model, correct, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=config)
PTECallback.attach(trainer)
trainer.train()
trainer.save_model()
