"""The places in a causal LM where the method sits: one attention layer, and the linears beside it, per decoder layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..config import PTEConfig
from ..method.layer import is_linear
from ..method.rotary import Rotation, find_rotation, has_numbers, probe

# Classes of linear layers that choose experts instead of computing features.
_ROUTERS = ("Router", "TopK", "Gate")
# Rotations that depend on the length of the call: a rollout and its replay would rotate differently.
_LENGTH_DEPENDENT_ROTATIONS = ("dynamic", "longrope")


@dataclass
class Site:
    """One decoder layer."""

    index: int
    block: str
    """Name of the decoder layer in the model; its linears are below it."""
    attention_name: str
    attention: nn.Module
    layer_type: str | None
    width: int
    """``D``, flattened KV width."""
    rotation: Rotation | None
    rotation_error: NotImplementedError | None
    evicts: bool
    """Whether the window bounds it: sliding and linear attention keep what they keep, and lose nothing to a state."""


def find_sites(model: PreTrainedModel) -> dict[int, Site]:
    """The decoder layers of ``model`` by index.

    Raises:
        NotImplementedError: The model is no decoder whose attention layers and positions can be told.
    """
    config = model.config.get_text_config(decoder=True)
    _refuse_architecture(model, config)
    layer_types = getattr(config, "layer_types", None)
    kept = DynamicCache(config=config).layers
    sites: dict[int, Site] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not type(module).__name__.endswith("Attention"):
            continue
        if index in sites:
            raise NotImplementedError(
                f"{type(model).__name__} has two attention layers of index {index} (`{sites[index].attention_name}` and "
                f"`{name}`), so it is not clear whose keys and values are evicted. PTE supports decoder-only models with "
                "one attention layer per decoder layer."
            )
        layer_type = layer_types[index] if layer_types else None
        evicts = type(kept[index]) is DynamicLayer if index < len(kept) else True
        backbone = find_backbone(model, name)
        rotation, error, width = None, None, 0
        if evicts:
            try:
                rotation = find_rotation(module, backbone, layer_type)
            except NotImplementedError as raised:
                error = raised
            width = _kv_width(module, backbone, rotation)
        block = name.rpartition(".")[0]
        sites[index] = Site(index, block, name, module, layer_type, width, rotation, error, evicts)
    if not sites:
        raise NotImplementedError(
            f"{type(model).__name__} has no attention layer that keeps keys and values (`layer_idx` on a class named "
            "...Attention). PTE supports transformers' decoder-only causal LMs."
        )
    layers, _, _ = next(iter(sites.values())).block.rpartition(".")
    for number, layer in model.get_submodule(layers).named_children():
        index = int(number) if number.isdecimal() else -1
        if index >= 0 and index not in sites:
            # Linear attention, convolution: no keys and values, so nothing that could be evicted.
            name, layer_type = f"{layers}.{number}", layer_types[index] if layer_types else None
            sites[index] = Site(index, name, name, layer, layer_type, 0, None, None, False)
    return dict(sorted(sites.items()))


def check_config(model: PreTrainedModel, sites: dict[int, Site], config: PTEConfig) -> None:
    """Refuse what ``config`` asks of ``model`` and cannot be had.

    Raises:
        NotImplementedError: With the reason and the field to change.
        ValueError: A marker of tokens that the model does not have.
    """
    text_config: Any = model.config.get_text_config(decoder=True)
    if isinstance(config.prompt_end, list) and max(config.prompt_end) >= text_config.vocab_size:
        raise ValueError(
            f"`prompt_end` must hold ids below {text_config.vocab_size}, the vocabulary of the model, got "
            f"{max(config.prompt_end)}. Derive it from the model's own tokenizer: peft_pte.prompt_end(tokenizer)."
        )
    if config.cache_window is None:
        return
    if config.eviction != "sliding_window" and model.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"`eviction` is {config.eviction!r} on a base in {model.dtype}: rounding can make it choose differently in a "
            "rollout and in its replay, and log-probs then differ by more than rounding. Use "
            'eviction="sliding_window" for RL, or a base in float32.',
            UserWarning,
            stacklevel=6,
        )
    if config.key_rotation == "removed" and config.state_update == "progressive":
        error = next((site.rotation_error for site in sites.values() if site.rotation_error), None)
        if error is not None:
            raise error
    for name in _rope_types(text_config):
        if name in _LENGTH_DEPENDENT_ROTATIONS:
            raise NotImplementedError(
                f"`cache_window` cannot bound a model with rope_type={name!r}: its rotation depends on the length of the "
                "call, so a rollout and its replay would differ. Use a model with another rope_type, or "
                "PTEConfig(cache_window=None)."
            )


def default_targets(model: nn.Module, sites: dict[int, Site]) -> set[str]:
    """Last names of all linear layers of the decoder blocks, adapted already or not."""
    blocks = tuple(site.block + "." for site in sites.values())
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(blocks) or name.startswith(inside or (" ",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
            module = module.get_base_layer()
        if is_linear(module) and not any(word in type(module).__name__ for word in _ROUTERS):
            names.add(name.rpartition(".")[2])
    return names


def site_of(sites: dict[int, Site], name: str) -> Site | None:
    """The decoder layer that the module ``name`` belongs to."""
    return next((site for site in sites.values() if name.startswith(site.block + ".")), None)


def _refuse_architecture(model: PreTrainedModel, config: Any) -> None:
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{kind} is an encoder-decoder model, whose thoughts attend to an encoder as well. PTE supports decoder-only "
            "causal LMs."
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt", "cpmant"):
        raise NotImplementedError(
            f"{kind} derives positions from the attention mask (ALiBi and its kin), so tokens would move when others are evicted. "
            "PTE supports rotary and learned absolute positions."
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise NotImplementedError(
            f"{kind} caches compressed keys and values (multi-head latent attention), of different widths. PTE supports "
            "multi-head and grouped-query attention."
        )


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(entry.get("rope_type", "default")) for entry in nested}


def find_backbone(model: PreTrainedModel, attention_name: str) -> PreTrainedModel:
    """The innermost model that holds the attention layer: the one whose forward every caller ends in."""
    backbone, name = model, attention_name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
    return backbone


def _kv_width(attention: nn.Module, backbone: Any, rotation: Rotation | None) -> int:
    """``D``, from what the layer writes to its cache where it can be tried alone, else from its config.

    Raises:
        NotImplementedError: Keys and values have different widths.
    """
    try:
        written = probe(attention, backbone, rotation, 0) if has_numbers(attention) else None
    except (TypeError, RuntimeError, AttributeError):
        written = None  # Not a layer that can be tried alone: the config has to do.
    if written is not None:
        widths = {part.shape[1] * part.shape[3] if part.ndim == 4 else -1 for part in (written.keys, written.values)}
        if len(widths) > 1 or -1 in widths:
            raise NotImplementedError(
                f"{type(attention).__name__} caches keys of shape {tuple(written.keys.shape)} and values of shape "
                f"{tuple(written.values.shape)}. PTE supports layers that cache both as [B, G, T, head_dim]."
            )
        return widths.pop()
    config = getattr(attention, "config", backbone.config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for owner, name in ((attention, "head_dim"), (attention, "head_size"), (config, "head_dim")):
        head_dim = getattr(owner, name, None)
        if head_dim is not None:
            return int(kv_heads * head_dim)
    return int(kv_heads * (config.hidden_size // heads))
