"""LoRA's field names in a `PTEConfig`: those that are spelled otherwise here, and those that the method lacks."""

from __future__ import annotations

RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}

_INITIALIZES = "It initializes LoRA's two matrices, and PTE's read a state between them; init_weights=True starts as the base model."
_NOT_TRANSFORMERS = "PTE adapts the linear layers of transformers' own models."
LACKING = {
    "bias": 'Biases stay frozen, as with LoRA\'s bias="none"; train whole modules with modules_to_save.',
    "use_dora": "DoRA rescales a merged weight, and a weight per sequence cannot be merged.",
    "trainable_token_indices": 'Train the embeddings in full with modules_to_save=["embed_tokens"].',
    "target_parameters": "PTE adapts linear layers: name them in target_modules; experts in one tensor stay frozen.",
    "layer_replication": "A cache layer belongs to one decoder layer: replicate the layers in the base model itself.",
    "loftq_config": _INITIALIZES,
    "eva_config": _INITIALIZES,
    "corda_config": _INITIALIZES,
    "lora_ga_config": _INITIALIZES,
    "megatron_config": _NOT_TRANSFORMERS,
    "megatron_core": _NOT_TRANSFORMERS,
    "use_qalora": "QALoRA merges into a quantized weight, and a weight per sequence cannot be merged.",
    "qalora_group_size": "QALoRA merges into a quantized weight, and a weight per sequence cannot be merged.",
    "lora_bias": "The adapters have no biases; train whole modules with modules_to_save.",
    "alora_invocation_tokens": "The adapter acts from the first token on; where a prompt ends is the cache's concern.",
    "velora_config": "To save memory use gradient checkpointing, with recompute_layers and offload.",
    "monteclora_config": "PTE's weights are no samples of a distribution.",
    "kasa_config": "KaSA truncates the base weight and merges, and a weight per sequence cannot be merged.",
    "use_bdlora": "The adapters have no block-diagonal form; use a smaller r.",
    "arrow_config": "Arrow mixes adapters token by token, and a cache holds the states of one; use set_adapter.",
    "runtime_config": "Adapters stay on the device of their layer; `offload` is about activations.",
    "ensure_weight_tying": "The head is not adapted, so nothing that is adapted is tied.",
}


def is_lora_field(name: str) -> bool:
    """Whether ``name`` is a field of ``LoraConfig`` and none of ``PTEConfig``."""
    return name in RENAMED or name in LACKING


def explain_argument(name: str, value: object) -> str:
    """Why a constructor refuses the argument ``name``.

    In the words of Python's own TypeError too: peft knows by them that a file comes from a newer version, and drops it.
    """
    got = f"got an unexpected keyword argument {name!r} ({value!r})"
    if name in RENAMED:
        return f"`{name}` must be given as `{RENAMED[name]}`, {got}. Use {RENAMED[name]}={value!r}."
    return f"`{name}` must be left out, {got}: it is LoRA's, and PTE lacks it. {LACKING[name]}"


def explain_attribute(name: str) -> str:
    """Why a config has no attribute ``name``."""
    if name in RENAMED:
        return f"`{name}` must be read and set as `{RENAMED[name]}` in a PTEConfig."
    return f"`{name}` is a field of LoRA that PTE lacks. {LACKING[name]}"
