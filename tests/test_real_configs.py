"""The models that people fine-tune, at their true shapes, on the meta device: where adapters and encoders go, and how wide they are."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_pte import PTEConfig
from peft_pte.seam import Seam

# Fields that differ from the defaults of transformers, from the published config files.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape(width, inner, layers, heads, kv_heads, vocabulary, **more):
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


# name: type, fields, bounded layers, D_k, D_v, billions of parameters
MODELS = {
    "Qwen2.5-3B": ("qwen2", shape(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True), 36, 256, 256, 3.09),
    "Qwen2.5-7B": ("qwen2", shape(3584, 18944, 28, 28, 4, 152064), 28, 512, 512, 7.6),
    "R1-Distill-Llama-8B": (
        "llama",
        shape(4096, 14336, 32, 32, 8, 128256, rope_parameters=LLAMA3),
        32,
        1024,
        1024,
        8.0,
    ),
    "Llama-3.2-1B": (
        "llama",
        shape(2048, 8192, 16, 32, 8, 128256, head_dim=64, rope_parameters=LLAMA3, tie_word_embeddings=True),
        16,
        512,
        512,
        1.24,
    ),
    "Qwen3-0.6B": (
        "qwen3",
        shape(1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
        28,
        1024,
        1024,
        0.6,
    ),
    "Qwen3-8B": ("qwen3", shape(4096, 12288, 36, 32, 8, 151936, head_dim=128), 36, 1024, 1024, 8.2),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        shape(2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=128, moe_intermediate_size=768),
        48,
        512,
        512,
        30.5,
    ),
    "Qwen3-Next-80B-A3B": ("qwen3_next", {}, 12, 512, 512, None),
    "Llama-4-Scout": ("llama4_text", {"num_hidden_layers": 8}, 2, 1024, 1024, None),
    "Gemma-3-4B (text)": ("gemma3_text", shape(2560, 10240, 34, 8, 4, 262208, head_dim=256), 5, 1024, 1024, 3.9),
    "Gemma-3-4B": (
        "gemma3",
        {
            "text_config": shape(2560, 10240, 34, 8, 4, 262208, head_dim=256),
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
        5,
        1024,
        1024,
        4.3,
    ),
    "Gemma-4": ("gemma4_text", {}, None, None, None, None),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 12, 512, 512, 20.9),
    "Mistral-7B-v0.3": (
        "mistral",
        shape(4096, 14336, 32, 32, 8, 32768, sliding_window=None),
        32,
        1024,
        1024,
        7.25,
    ),
    "Phi-4": (
        "phi3",
        shape(5120, 17920, 40, 40, 10, 100352, pad_token_id=0, sliding_window=None),
        40,
        1280,
        1280,
        14.7,
    ),
    "SmolLM3-3B": ("smollm3", {}, 36, 512, 512, 3.08),
    "OLMo-3-7B": ("olmo3", {"hidden_size": 4096, "vocab_size": 100278}, 8, 4096, 4096, None),
    "Granite-4.0-H-tiny": (
        "granitemoehybrid",
        shape(1536, 512, 40, 12, 4, 100352, layer_types=(["mamba"] * 9 + ["attention"]) * 4, num_local_experts=64)
        | {"shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64},
        4,
        512,
        512,
        None,
    ),
    "LFM2-1.2B": (
        "lfm2",
        shape(2048, 12288, 16, 32, 8, 65536, layer_types=["conv", "conv", "full_attention", "conv"] * 4),
        4,
        512,
        512,
        None,
    ),
    "DeepSeek-V3": ("deepseek_v3", {"num_hidden_layers": 4}, 4, 512, 64, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_injected_on_the_meta_device(name):
    kind, fields, bounded, key_width, value_width, billions = MODELS[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.bfloat16)
        if billions is not None:
            parameters = sum(parameter.numel() for parameter in base.parameters())
            assert parameters / 1e9 == pytest.approx(billions, rel=0.05)
        model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    seam = Seam.require(model.get_base_model())
    encoders = [site for index, site in seam.sites.items() if site.evicts]
    assert all(seam.encoder(site.index).holds("default") for site in encoders)
    assert bounded is None or len(encoders) == bounded
    assert encoders
    assert key_width is None or {(site.key_width, site.value_width) for site in encoders} == {(key_width, value_width)}
    adapted = {name for name, _ in model.named_modules() if name.endswith(".pte_down.default")}
    layers = tuple(f"base_model.model.{site.block}." for site in seam.sites.values())
    assert adapted
    assert all(name.startswith(layers) for name in adapted)
    # The rotation is the one that the structure tells, or keys are said to be kept as they are.
    kept = any(site.unknown_rotation for site in encoders)
    assert model.peft_config["default"].key_rotation == ("kept" if kept else "removed")
