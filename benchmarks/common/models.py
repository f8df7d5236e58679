"""What is measured: small random models of three architectures, the true shapes, and how adapters are put on them.

`peft` and `peft_pte` are imported where they are used, so that the list of questions costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

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


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def _shape(config_class: type, *sizes: int, parameters: int, **more: Any) -> TrueShape:
    return TrueShape(config_class, {**dict(zip(SIZES, sizes, strict=True)), **more}, parameters)


TRUE_SHAPES = {
    "Qwen2.5-3B": _shape(Qwen2Config, 151936, 2048, 11008, 36, 16, 2, 32768, True, parameters=3_085_938_688),
    "Qwen2.5-7B": _shape(Qwen2Config, 152064, 3584, 18944, 28, 28, 4, 32768, False, parameters=7_615_616_512),
    "Llama-3.1-8B": _shape(LlamaConfig, 128256, 4096, 14336, 32, 32, 8, 131072, False, parameters=8_030_261_248),
    "Qwen3-4B": _shape(Qwen3Config, 151936, 2560, 9728, 36, 32, 8, 40960, True, parameters=4_022_468_096, head_dim=128),
    "GPT-2 XL": TrueShape(GPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
}
# Shapes that a CPU runs: one that was made up, and one that was published.
CPU_SHAPES = {
    "tiny": _shape(LlamaConfig, 2048, 256, 688, 4, 8, 2, 65536, True, parameters=3_295_488),
    "SmolLM2-135M": _shape(LlamaConfig, 49152, 576, 1536, 30, 9, 3, 8192, True, parameters=134_515_008),
}
GPU_SHAPES = ("Qwen2.5-3B", "Qwen2.5-7B", "Llama-3.1-8B")
SHAPES = {**TRUE_SHAPES, **CPU_SHAPES}


def small_base(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Any:
    """A random model of ``family`` that runs on a CPU, in evaluation mode."""
    config_class, fields = SMALL_MODELS[family]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_class(**fields), attn_implementation=attention, dtype=dtype).eval()


def random_llama(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int, **fields: Any
) -> Any:
    """A Llama of these sizes with random weights; ``fields`` are further ones of its config."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        **fields,
    )
    return LlamaForCausalLM(config)


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The config of the shape ``name``, with ``layers`` decoder layers instead of its own."""
    shape = SHAPES[name]
    fields = shape.fields if layers is None else {**shape.fields, "num_hidden_layers": layers}
    return shape.config_class(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def shaped_base(
    name: str,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    layers: int | None = None,
) -> Any:
    """A random model of the shape ``name``, in evaluation mode; on the meta device, shapes and no numbers.

    Raises:
        ValueError: The shape does not have its number of parameters.
    """
    torch.manual_seed(0)
    with torch.device(device):
        config = shape_config(name, layers)
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    found, expected = base.num_parameters(), SHAPES[name].parameters
    if layers is None and found != expected:
        raise ValueError(f"`{name}` must have {expected:,} parameters, got {found:,}.")
    return base.eval()


def pte_config(**fields: Any) -> Any:
    """A `PTEConfig` for a causal LM."""
    from peft_pte import PTEConfig

    return PTEConfig(task_type="CAUSAL_LM", **fields)


def with_pte(base: Any, *, meta: bool = False, autocast: bool = True, **fields: Any) -> Any:
    """``base`` under PTE; without ``autocast`` the adapters have the dtype of the base."""
    from peft import get_peft_model

    config = pte_config(**fields)
    return get_peft_model(base, config, low_cpu_mem_usage=meta, autocast_adapter_dtype=autocast)


def with_lora(base: Any, r: int, targets: set[str], *, meta: bool = False, autocast: bool = True) -> Any:
    """``base`` under plain LoRA of rank ``r`` on the linear layers that PTE adapts."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=sorted(targets))
    return get_peft_model(base, config, low_cpu_mem_usage=meta, autocast_adapter_dtype=autocast)


LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""The linear layers of the Llama and Qwen2 shapes, all of which are adapted."""


def prompts(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts, left-padded: ``input_ids`` and ``attention_mask``."""
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def forget_numbers(model: nn.Module) -> None:
    """Weights of the meta device become fake ones of the CPU, whose kernels all exist; shared weights stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = made.setdefault(id(weight), nn.Parameter(fake, weight.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def words_tokenizer(vocabulary: dict[str, int], pad: str, eos: str, bos: str) -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(tokens.WordLevel(vocabulary, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, padding_side="left"
    )
