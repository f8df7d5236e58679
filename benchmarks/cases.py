"""What is measured: small random models of three architectures, and the true shapes that are only computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from peft_pte import PTEConfig

# Small, so that logits do not drown what is looked at; unlike any other width, so that shapes tell what a tensor is.
VOCABULARY = 80
POSITIONS = 4096
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
# Larger initial weights than a model is trained from: logits that differ by more than rounding when something is wrong.
SPREAD = {"initializer_range": 0.1}
GROUPED = {
    **COMMON,
    **SPREAD,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
LEARNED = {
    **COMMON,
    **SPREAD,
    "n_embd": 192,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SMALL_MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "Llama": (LlamaConfig, GROUPED),
    "Qwen2": (Qwen2Config, GROUPED),
    "GPT-2": (GPT2Config, LEARNED),
}
SMALL_ADAPTER = {"r": 8, "num_global_tokens": 8}


@dataclass(frozen=True)
class TrueShape:
    """The shape of a published model, and its published number of parameters, which the shape must reproduce."""

    config_class: type
    fields: dict[str, Any]
    parameters: int


TRUE_SHAPES = {
    "Qwen2.5-3B": TrueShape(
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        3_085_938_688,
    ),
    "Qwen2.5-7B": TrueShape(
        Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Llama-3.1-8B": TrueShape(
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "GPT-2 XL": TrueShape(GPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
}


def small_base(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Any:
    """A random model of ``family`` that runs on a CPU, in evaluation mode."""
    config_class, fields = SMALL_MODELS[family]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_class(**fields), attn_implementation=attention, dtype=dtype).eval()


def true_base(name: str) -> Any:
    """The true shape ``name`` on the meta device: shapes and no numbers.

    Raises:
        ValueError: The shape does not have the published number of parameters.
    """
    shape = TRUE_SHAPES[name]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape.config_class(**shape.fields))
    found = base.num_parameters()
    if found != shape.parameters:
        raise ValueError(f"`{name}` must have {shape.parameters:,} parameters as published, got {found:,}.")
    return base


def with_pte(base: Any, *, meta: bool = False, **fields: Any) -> Any:
    """``base`` under PTE."""
    return get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **fields), low_cpu_mem_usage=meta)


def with_lora(base: Any, r: int, targets: set[str], *, meta: bool = False) -> Any:
    """``base`` under plain LoRA of rank ``r`` on the linear layers that PTE adapts."""
    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=sorted(targets))
    return get_peft_model(base, config, low_cpu_mem_usage=meta)


def prompts(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts, left-padded: ``input_ids`` and ``attention_mask``."""
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
