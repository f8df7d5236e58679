"""Every causal LM of the installed transformers, tiny and random: configs made small field by field, kinds of layers kept."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 61
WIDTH, HEADS, HEAD_DIM = 32, 4, 8
SLIDING = 6
# Fields by what their names say; the first that matches. Whole names.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|vocabulary_size|vocab_size_per_layer_input|audio_vocab_size", VOCABULARY),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|embedding_size|emb_dim|word_embed_proj_dim|dim_model|lru_width", WIDTH),
    (r"hidden_size_per_layer_input", 8),
    (r".*(moe|expert).*(intermediate|ffn).*|expert_dim", 16),
    (
        r"intermediate_size.*|n_inner|.*ffn_dim|d_ff|ffn_hidden_size|ffn_size|dim_ff|.*ffn_hidden.*|mlp_intermediate_size",
        48,
    ),
    (r"num_hidden_layers|n_layers?|num_layers|.*decoder_layers|.*encoder_layers|num_blocks", 4),
    (r"num_attention_heads|n_heads?|num_heads|.*decoder_attention_heads|.*encoder_attention_heads", HEADS),
    (r"num_key_value_heads|swa_num_key_value_heads|num_global_key_value_heads|n_kv_heads|num_kv_heads", 2),
    (
        r"head_dim|global_head_dim|swa_head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim|kv_channels|dim_head|d_kv",
        HEAD_DIM,
    ),
    (r"qk_rope_head_dim", 4),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"index_n_heads", 2),
    (r"index_head_dim|index_topk", 8),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|ffn_num_experts", 4),
    (r"num_experts_per_tok|moe_top_k|moe_k|num_experts_per_token|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|context_length", 512),
    (
        r"sliding_window|sliding_window_size|attention_window_size|window_size|attention_chunk_size|local_attention",
        SLIDING,
    ),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_ssm_state", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"chunk_size|mamba_chunk_size|block_size", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"linear_(key|value)_head_dim", 8),
    (r"linear_num_(key|value)_heads", 2),
    (r".*(dropout|pdrop|drop_prob|layerdrop|jitter).*", 0.0),
    (r"initializer_range|init_std", 0.3),
    (r"pad_token_id", 0),
    (r"(bos|eos|sep|cls|decoder_start)_token_id", 1),
    # What is a bidirectional encoder by default.
    (r"is_decoder", True),
)
_KEPT = object()
# Read by their models as they are, so a default of None is none.
_SET_WHERE_NONE = ("pad_token_id", "head_dim")
# What no rule on names tells.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"linear_head_dim": 8, "linear_num_heads": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 61,
        "shape_embed_dim": 8,
        "shape_vocab_size": 61,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 500,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_unified_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    "nemotron": {"num_key_value_heads": 2},
    # Real ones have full attention: from version 0.2 on Mistral 7B has no sliding window, Ministral 8B mixes.
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "adapter_rank": 4,
        "attention_hidden_size": 64,
        "num_query_groups": 4,
    },
}


def config_types() -> list[str]:
    """Every type that ``AutoModelForCausalLM`` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of ``config`` that say how large a model is, made small."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**shrink(value), **OVERRIDES.get(value.model_type, {}), "model_type": value.model_type}
            continue
        small = next((small for pattern, small in _RULES if re.fullmatch(pattern, name)), _KEPT)
        if small is not _KEPT and (value is not None or name in _SET_WHERE_NONE):
            fields[name] = type(value)(small) if isinstance(value, (int, float)) else small
    if "qk_rope_head_dim" in fields:
        # Latent attention: heads of its own, and every one of them reads the latent.
        fields.pop("head_dim", None)
        fields.update({name: HEADS for name in fields if name.endswith("num_key_value_heads")})
    return {**fields, **_layer_types(config)}


def _layer_types(config: PreTrainedConfig) -> dict[str, Any]:
    """Kinds of layers as mixed as in ``config``, in fewer layers."""
    kinds = vars(config).get("layer_types")
    if not kinds:
        return {}
    different = list(dict.fromkeys(kinds))
    return {"num_hidden_layers": 4, "layer_types": (different * 4)[:4]} if len(different) <= 4 else {}


def tiny_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    """A small config of a type."""
    default = AutoConfig.for_model(kind)
    return type(default)(**{**shrink(default), **OVERRIDES.get(kind, {}), **overrides})


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small random causal LM of a type."""
    torch.manual_seed(seed)
    config = tiny_config(kind)
    for part in (config, config.get_text_config(decoder=True)):
        part._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    if kind == "xmod":
        model.set_default_language("en_XX")
    for part in model.modules():
        # A vector of zeros has no gradient of its length.
        if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None:
            torch.nn.init.normal_(part.weight.data[part.padding_idx])
    # No end: every rollout has as many tokens as were asked for.
    model.generation_config.eos_token_id = None
    return model.to(dtype)
