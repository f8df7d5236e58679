"""The places in a causal LM where the method sits: one attention layer, and the linears beside it, per decoder layer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..config import PTEConfig
from ..eviction.policy import EvictionPolicy, make_policy
from ..method.rotary import Rotation
from .attention import can_be_watched
from .compat import (
    BLOCKS_IN_MASKS,
    CACHE_NAMES,
    FULL_ATTENTION,
    LATENT,
    LAYER_NUMBERS,
    LENGTH_DEPENDENT_ROTATIONS,
    PER_TOKEN,
    POSITIONS_FROM_MASK,
    attention_of,
    counts_its_cache,
    sharing_of,
)
from .rotations import find_rotation, guess_rotation
from .trial import Trial, has_numbers, try_out


@dataclass
class Site:
    """One decoder layer."""

    index: int
    """Its layer of the cache."""
    block: str
    """Name of the decoder layer in the model; its linears are below it."""
    attention_name: str
    attention: nn.Module
    layer_type: str | None
    evicts: bool
    """Whether the window bounds it: sliding and linear attention keep what they keep, and lose nothing to a state."""
    key_width: int = 0
    """``D_k``, flattened width of what is cached as keys."""
    value_width: int = 0
    """``D_v``, the same of values."""
    heads: int = 0
    """KV heads ``G``; 0: not known."""
    key_rotation: Rotation | None = None
    """``None``: keys are cached unrotated."""
    value_rotation: Rotation | None = None
    """The same of values, which latent attention rotates."""
    unknown_rotation: str | None = None
    """Why the rotation of keys cannot be undone, if so."""
    sharing: str | None = None
    """``"store"``: later layers read its keys and values. ``"reuse"``: it reads those of an earlier one."""
    token_axes: dict[str, int] = field(default_factory=lambda: dict(PER_TOKEN))
    """Inputs of the decoder layer that have a token axis, and which it is, counted from the last."""

    @property
    def borrows(self) -> bool:
        """Whether it reads the bounded keys and values of another layer."""
        return self.sharing == "reuse" and self.layer_type == FULL_ATTENTION


@dataclass
class Sites:
    """All decoder layers of a model."""

    backbone: PreTrainedModel
    """The innermost model that holds them: the one whose forward every caller ends in."""
    by_index: dict[int, Site]
    readers: frozenset[str] = field(default_factory=frozenset)
    """Names of linears that read what is cached: no token is their own, so no state is."""
    idle: tuple[str, ...] = ()
    """Names of attention layers that do not run where there is nothing but text: cross-attention."""
    wants_masks: bool = False
    """Whether layers get a mask even where they see all that is not later."""
    rotary: bool = False
    """Whether positions are told by rotation, so that there is no last one."""
    together: list[list[str]] = field(default_factory=list)
    """Names of linears that read one and the same tensor, in the order in which they run; empty where that was not tried out."""


def find_sites(model: PreTrainedModel) -> Sites:
    """The decoder layers of ``model``.

    Raises:
        NotImplementedError: The model is no decoder whose attention layers and positions can be told.
    """
    config = model.config.get_text_config(decoder=True)
    _refuse_architecture(model, config)
    layer_types = getattr(config, "layer_types", None) or ()
    try:
        cache = DynamicCache(config=config)
    except (AttributeError, KeyError, ValueError) as error:
        raise NotImplementedError(
            f"transformers makes no DynamicCache for {type(config).__name__} ({type(error).__name__}: {error}), whose layers PTE bounds. Use "
            "LoRA for this model."
        ) from error
    kept = cache.layers
    # Linear attention and convolutions are called with a cache as well, and keep nothing in it that could be evicted.
    linear = {index for index, is_linear in enumerate(cache.is_linear) if is_linear}
    found = [attention for attention in _attentions(model) if attention[0] not in linear]
    if not found:
        raise NotImplementedError(
            f"{type(model).__name__} has no decoder layer that keeps keys and values of its tokens in a cache of transformers, so there "
            "is nothing that could be evicted and encoded. Use LoRA for this model."
        )
    backbone = find_backbone(model, found[0][1])
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    sites: dict[int, Site] = {}
    competing: dict[int, list[nn.Module]] = {}
    for index, name, module, block in found:
        if prefix and not name.startswith(f"{prefix}."):
            continue
        evicts = type(kept[index]) is DynamicLayer if index < len(kept) else True
        if index in sites and sites[index].block != block:
            raise NotImplementedError(
                f"{type(model).__name__} has two decoder layers that write to layer {index} of the cache (`{sites[index].block}` and "
                f"`{block}`): one layer's weights run more than once per token, so it is not clear which of its states an adapter reads. "
                "Use LoRA for this model."
            )
        layer_type = layer_types[index] if index < len(layer_types) else None
        sites.setdefault(index, Site(index, block, name, module, layer_type, evicts))
        competing.setdefault(index, []).append(module)
    _refuse_shared_layers(model, sites)
    for site in sites.values():
        site.sharing = sharing_of(config, site.index)
    for number, name, layer in _other_layers(model, next(iter(sites.values())).block, sites):
        layer_type = layer_types[number] if number < len(layer_types) else None
        # Linear attention, convolution: no keys and values, so nothing that could be evicted.
        sites[number] = Site(number, name, name, layer, layer_type, False)
    layers = [model.get_submodule(site.block) for site in sites.values()]
    trial = try_out(backbone, competing, layers) if has_numbers(backbone) else None
    for site, layer in zip(sites.values(), layers, strict=True):
        if site.evicts:
            _measure(model, backbone, site, trial)
        if trial is not None and layer in trial.token_axes:
            site.token_axes = trial.token_axes[layer]
            _check_tokens(model, site, layer)
    working = {id(site.attention) for site in sites.values()}
    idle = tuple(
        f"{name}."
        for index, name, module, _ in found
        if index in sites and sites[index].evicts and id(module) not in working
    )
    within = f"{prefix}." if prefix else ""
    readers = frozenset() if trial is None else frozenset(within + name for name in trial.readers)
    together = [] if trial is None else [[within + name for name in names] for names in trial.together]
    parts = (site.key_rotation or site.value_rotation or site.unknown_rotation for site in sites.values())
    masked = trial is not None and any(
        layer in trial.masked for site, layer in zip(sites.values(), layers, strict=True) if site.evicts
    )
    return Sites(backbone, dict(sorted(sites.items())), readers, idle, masked, any(parts), together)


def _attentions(model: PreTrainedModel) -> Iterator[tuple[int, str, nn.Module, str]]:
    """Modules that know their layer of the cache and take one, innermost ones: index, name, module, decoder layer."""
    found: list[tuple[int, str, nn.Module]] = []
    for name, module in model.named_modules():
        index = next(
            (value for number in LAYER_NUMBERS if isinstance(value := getattr(module, number, None), int)), None
        )
        if index is None or isinstance(module, BaseTunerLayer):
            continue
        if any(known in inspect.signature(type(module).forward).parameters for known in CACHE_NAMES):
            found.append((index, name, module))
    outer = {
        name for index, name, _ in found for other, below, _ in found if other == index and below.startswith(f"{name}.")
    }
    for index, name, module in found:
        block = decoder_layer_of(model, name)
        if name not in outer and block is not None:
            yield index, name, module, block


def decoder_layer_of(model: nn.Module, name: str) -> str | None:
    """The decoder layer around the module ``name``: the nearest ancestor that is an item of a list; ``None``: there is none."""
    while "." in name:
        name = name.rpartition(".")[0]
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            return name
    return None


def _other_layers(model: nn.Module, block: str, sites: dict[int, Site]) -> Iterator[tuple[int, str, nn.Module]]:
    """Decoder layers beside ``block`` that have no attention."""
    layers = block.rpartition(".")[0]
    taken = {site.block for site in sites.values()}
    for number, layer in model.get_submodule(layers).named_children():
        name = f"{layers}.{number}"
        if number.isdecimal() and int(number) not in sites and name not in taken:
            yield int(number), name, layer


def _refuse_shared_layers(model: PreTrainedModel, sites: dict[int, Site]) -> None:
    blocks = [site.block for site in sites.values() if site.evicts]
    twice = next((block for block in blocks if blocks.count(block) > 1), None)
    if twice is not None:
        raise NotImplementedError(
            f"{type(model).__name__} has several attention layers in one decoder layer (`{twice}`), whose linears could read the state of "
            "only one of them. Use LoRA for this model."
        )


def _check_tokens(model: PreTrainedModel, site: Site, layer: nn.Module) -> None:
    names = list(inspect.signature(inspect.unwrap(type(layer).forward)).parameters)
    if site.evicts and names[1] not in site.token_axes:
        raise NotImplementedError(
            f"`{site.block}` of {type(model).__name__} ({type(layer).__name__}) computes several vectors per token, which cannot be told apart "
            "by token. Use LoRA for this model."
        )


def _measure(model: PreTrainedModel, backbone: PreTrainedModel, site: Site, trial: Trial | None) -> None:
    """Note what a layer caches and how it turns it.

    Raises:
        NotImplementedError: It caches nothing that has heads and tokens.
    """
    if trial is None:
        site.key_width, site.value_width = _widths(site.attention, backbone)
        try:
            rotation = guess_rotation(backbone, site.attention, site.layer_type)
        except LookupError as error:
            site.unknown_rotation = str(error)
        else:
            latent = hasattr(site.attention, LATENT)
            site.key_rotation, site.value_rotation = (None, rotation) if latent else (rotation, None)
        return
    cached = trial.cached.get(site.index)
    if cached is None or any(part.ndim != 4 for part in (*cached.keys, *cached.values)):
        raise NotImplementedError(
            f"`{site.attention_name}` of {type(model).__name__} ({type(site.attention).__name__}) hands no keys and values "
            f"[B, heads, T, head_dim] to the layer of the cache that it is numbered for ({trial.failed.get(site.index, 'text does not reach it')}), "
            "so it is not known what leaves it. Use LoRA for this model."
        )
    site.attention = trial.writers[site.index]
    site.attention_name = next(name for name, module in model.named_modules() if module is site.attention)
    site.key_width, site.value_width = (part[0].shape[1] * part[0].shape[3] for part in (cached.keys, cached.values))
    site.heads = cached.keys[0].shape[1]
    try:
        site.key_rotation, site.value_rotation = (
            find_rotation(backbone, site.attention, site.layer_type, part, cached.positions)
            for part in (cached.keys, cached.values)
        )
    except LookupError as error:
        site.unknown_rotation = str(error)


def check_config(model: PreTrainedModel, sites: Sites, config: PTEConfig) -> None:
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
    policy = make_policy(config.eviction, config.eviction_options)
    if not policy.exact and model.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"`eviction` is {config.eviction!r} on a base in {model.dtype}: rounding can make it choose differently in a "
            "rollout and in its replay, and log-probs then differ by more than rounding. For RL hand the choices of the rollout to scoring "
            "(generate(..., return_evictions=True), model(..., evictions=...); in TRL: RecordedEvictions.attach(trainer)), or use "
            'eviction="sliding_window" or "random".',
            UserWarning,
            stacklevel=6,
        )
    _check_queries(model, sites, config, policy)
    if not policy.uniform and any(site.borrows for site in sites.by_index.values()):
        raise NotImplementedError(
            f'`eviction` must be "sliding_window" for {type(model).__name__}, got {config.eviction!r}: some of its layers read the keys and '
            "values of others, and would have to know what each head of those has given up."
        )
    for name in _rope_types(text_config):
        if name in LENGTH_DEPENDENT_ROTATIONS:
            raise NotImplementedError(
                f"`cache_window` cannot bound a model with rope_type={name!r}: its rotation depends on the length of the "
                "call, so a rollout and its replay would differ. Use a model with another rope_type, or "
                "PTEConfig(cache_window=None)."
            )


def _check_queries(model: PreTrainedModel, sites: Sites, config: PTEConfig, policy: EvictionPolicy) -> None:
    """Refuse a policy that needs what the attention of the model does not show.

    Raises:
        NotImplementedError: Its queries cannot be seen, or its heads cannot see different numbers of thoughts.
    """
    evicting = [site for site in sites.by_index.values() if site.evicts]
    unseen = [site for site in evicting if not can_be_watched(site.attention)]
    if policy.observed and unseen:
        raise NotImplementedError(
            f"`eviction` must not be {config.eviction!r} for {type(model).__name__}, whose {type(unseen[0].attention).__name__} does not go through the "
            'attention interface of transformers, so its queries are not known. Use "key_diff", "random" or "sliding_window".'
        )
    latent = [site for site in evicting if hasattr(site.attention, LATENT)]
    if policy.observed and latent:
        raise NotImplementedError(
            f"`eviction` must not be {config.eviction!r} for {type(model).__name__}: its {type(latent[0].attention).__name__} caches something else "
            'than the keys that its queries meet. Use "key_diff", "random" or "sliding_window".'
        )
    steps = config.tokens_per_eviction
    budgets = {site.index: policy.budgets(site.index, config.cache_window or 0, steps) for site in evicting}
    shared = {index: given for index, given in budgets.items() if given is not None}
    for site in evicting:
        if site.heads and site.index in shared and len(shared[site.index]) != site.heads:
            raise ValueError(
                f"`importance` must hold {site.heads} numbers for layer {site.index}, one for each KV head, got {len(shared[site.index])}. Measure it on "
                "this model: peft_pte.head_importance(model, input_ids)."
            )
    text_config: Any = model.config.get_text_config(decoder=True)
    if shared and attention_of(text_config) not in ("eager", "sdpa"):
        raise NotImplementedError(
            f"`eviction` must not be {config.eviction!r} with attn_implementation={attention_of(text_config)!r}: heads that hold different numbers of "
            'thoughts need a mask of their own each. Load the model with attn_implementation "sdpa" or "eager", or use eviction="attention".'
        )


def keep_unknown_rotation(sites: Sites, config: PTEConfig) -> None:
    """Take ``key_rotation="kept"``, with a warning, where the rotation of keys cannot be undone."""
    reason = next((site.unknown_rotation for site in sites.by_index.values() if site.unknown_rotation), None)
    if reason is None or config.key_rotation == "kept" or config.state_update != "progressive":
        return
    config.key_rotation = "kept"
    warnings.warn(
        f'`key_rotation` is "kept" for this model: {reason}. What leaves the cache is encoded as it is cached, rotation and all. Say '
        'PTEConfig(key_rotation="kept") to be asked no more.',
        UserWarning,
        stacklevel=5,
    )


def site_of(sites: Sites, name: str) -> Site | None:
    """The decoder layer that the module ``name`` belongs to."""
    return next((site for site in sites.by_index.values() if name.startswith(site.block + ".")), None)


def _refuse_architecture(model: PreTrainedModel, config: Any) -> None:
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{kind} is an encoder-decoder model, whose thoughts attend to an encoder as well. PTE supports decoder-only "
            "causal LMs."
        )
    if config.model_type in BLOCKS_IN_MASKS:
        raise NotImplementedError(
            f"{kind} lets tokens of an image see each other by masks of its own, made over a cache that grows. Use LoRA for this model."
        )
    if counts_its_cache(config):
        raise NotImplementedError(
            f"{kind} has local attention that counts the columns of its cache itself, so tokens would move when others are evicted. Use "
            "LoRA for this model."
        )
    if getattr(config, "alibi", False) or config.model_type in POSITIONS_FROM_MASK:
        raise NotImplementedError(
            f"{kind} derives positions from the attention mask (ALiBi and its kin), so tokens would move when others are evicted. "
            "PTE supports rotary and learned absolute positions. Use LoRA for this model."
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


def _widths(attention: Any, backbone: Any) -> tuple[int, int]:
    """``D_k`` and ``D_v`` by the structure of a layer whose weights are not here."""
    latent = getattr(attention, "kv_lora_rank", None)
    if latent is not None:
        return int(latent), int(attention.qk_rope_head_dim)
    key = getattr(attention, "k_proj", None)
    if isinstance(key, nn.Linear):
        # Some layers cache their keys as values too.
        value = getattr(attention, "v_proj", None)
        return key.out_features, value.out_features if isinstance(value, nn.Linear) else key.out_features
    config = getattr(attention, "config", backbone.config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = next(
        (
            value
            for owner, name in ((attention, "head_dim"), (attention, "head_size"), (config, "head_dim"))
            if (value := getattr(owner, name, None)) is not None
        ),
        config.hidden_size // heads,
    )
    return int(kv_heads * head_dim), int(kv_heads * head_dim)
