"""The table of models that the laws are tested on: tiny, random, one per architecture."""

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCABULARY = 61
PAD = 0

# Large initial weights, so that logits differ by more than any tolerance when something is wrong.
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FULL_AND_SLIDING = {
    **GROUPED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "attention_dropout": 0.0,
}

MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GROUPED, "head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {**GROUPED, "sliding_window": None}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {**GROUPED, "sliding_window": None, "partial_rotary_factor": 0.5}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {
            **COMMON,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {
            **COMMON,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "rotary_pct": 0.5,
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, GROUPED),
    "granite": (GraniteForCausalLM, GraniteConfig, {**GROUPED, "attention_multiplier": 8**-0.5}),
    # Partial and interleaved rotary.
    "glm": (GlmForCausalLM, GlmConfig, {**GROUPED, "head_dim": 8, "partial_rotary_factor": 0.5}),
    # Rotary dimensions split off before the rotary code, not in it.
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        {**GROUPED, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    ),
    # The causal LM calls a decoder inside its base model.
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            **COMMON,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "init_std": 0.3,
            "dropout": 0.0,
        },
    ),
    # One key head for all query heads.
    "gpt_bigcode": (
        GPTBigCodeForCausalLM,
        GPTBigCodeConfig,
        {
            **COMMON,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    # Shared experts, which see the batch flattened, beside fused routed ones.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    # Layers without rotation between layers with it.
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    # Sliding attention beside full attention.
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**FULL_AND_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**FULL_AND_SLIDING, "query_pre_attn_scalar": 8}),
    # A latent and a rotated part in place of keys and values, of two widths.
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **GROUPED,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 3,
        },
    ),
}
EAGER_ONLY = ("gemma2",)
# What every law must hold for.
FAMILIES = tuple(MODELS)
# Those with sliding layers of their own have no static cache.
# One with rotary and grouped heads, one with learned positions and Conv1D: enough where the architecture is no issue.
TWO_FAMILIES = ("llama", "gpt2")


def make_base(name, *, attn_implementation="eager", **overrides):
    """A fresh random model of the family ``name`` in evaluation mode."""
    model_class, config_class, arguments = MODELS[name]
    config = config_class(**{**arguments, **overrides})
    config._attn_implementation = attn_implementation
    # The fast one has no float64.
    config._experts_implementation = "eager"
    return model_class(config).eval()
