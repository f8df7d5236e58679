"""Generation far past the window with a trained adapter: ``python examples/minimal_generate.py [ADAPTER]``."""

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import peft_pte as peft_pte  # registers the method with peft

adapter = sys.argv[1] if len(sys.argv) > 1 else "adapter"
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
question = [{"role": "user", "content": "What is 23 + 38? Think step by step, then end with the number alone."}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=512, min_new_tokens=200, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
cache = output.past_key_values
print(f"{cache.nbytes / 2**20:.1f} MiB hold {output.sequences.shape[1]} tokens' worth of thinking")
