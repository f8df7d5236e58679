"""From LoRA: an adapter that computes what a trained LoRA computes until something leaves the cache, and is trained on from there."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import PTEConfig
from ..lora_fields import LACKING, RENAMED
from ..method.encoder import PTEEncoder
from ..method.layer import PTELinear, weight_of
from ..seam import Seam
from .checkpoints import unwrap
from .install import remove

_CARRIED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
_FIXED = (*_CARRIED, "alpha", "init_weights")
# How a LoRA was started says nothing of what it is now, unless that changed the base model, which `init_lora_weights` tells.
# What `target_parameters` reaches is seen in the weights: peft names experts there by itself, also where a model has none.
_SEEN_ELSEWHERE = (
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "target_parameters",
)
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."


def convert_lora(
    source: PeftModel | str | os.PathLike[str],
    base: PreTrainedModel | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **fields: Any,
) -> PeftModel:
    """A PTE adapter that before the first eviction computes what a LoRA computes, and can be trained on.

    With ``S0`` the state that a layer starts with, ``A S0^T B`` of every linear equals LoRA's ``B A``: ``pte_down`` holds LoRA's ``A``, ``pte_up``
    LoRA's ``B`` times the inverse of ``S0``, and the encoders start so that ``S0`` is well conditioned. All weights are free to learn.
    rsLoRA, rank and alpha patterns, layers and ``modules_to_save`` are carried over; LoRA's dropout is not, because scoring would then use other
    weights than the rollout (``dropout=`` brings it back).

    Args:
        source: A model with one LoRA adapter, which is taken off it: use what is returned from then on (after an error it has its LoRA still). Or the
            folder or hub id of a saved LoRA.
        subfolder: Where in the folder or the repository a saved LoRA is; ``None``: at its top.
        revision: Branch, tag or commit of a hub repository; ``None``: its main branch. That of the base model is in the LoRA's config.
        base: The model to adapt, for a saved LoRA; ``None``: the one that its config names is loaded, in its own dtype.
        fields: Of the :class:`~peft_pte.PTEConfig`, as ``cache_window`` and ``prompt_end``. ``r`` (default: LoRA's) may be larger than LoRA's, for a
            larger state; ``num_global_tokens`` is at least the largest rank (default: that, or 32 where it is less).

    Returns:
        ``base`` with the adapter, under the name that the LoRA has (``"default"`` for a saved one).

    Raises:
        TypeError: ``source`` is no model of peft and no path, or its adapter is no LoRA.
        ValueError: The LoRA does something that PTE cannot (DoRA, biases, a base that it changed), it is switched off, or ``fields`` contradict it.
    """
    if isinstance(source, PeftModel):
        for argument, value in (("base", base), ("subfolder", subfolder), ("revision", revision)):
            if value is not None:
                raise ValueError(
                    f"`{argument}` must be None where `source` is a model, which brings its own. Leave it out."
                )
        name, lora, weights = _of_model(source)
    elif isinstance(source, (str, os.PathLike)):
        folder = _folder(os.fspath(source), subfolder, revision)
        name, lora = "default", _checked(PeftConfig.from_pretrained(folder))
        weights = load_peft_weights(folder, device="cpu")
    else:
        raise TypeError(
            f"`source` must be a PeftModel or the folder of a saved LoRA, got {type(source).__name__}. Save it with save_pretrained(folder) and give the folder."
        )
    downs, ups, others = _parts(weights)
    config = _config(lora, downs, fields)
    scales = {key: _scale(lora, key) for key in downs}
    if isinstance(source, PeftModel):
        # They can have been changed since.
        scales |= {key: layer.scaling[name] for key, layer in _layers(source) if name in layer.scaling}
        base = _unloaded(source)
    else:
        base = base or _named(lora)
    if Seam.of(base) is not None:
        raise ValueError("`base` must have no PTE adapter yet, and has one. Convert onto a base model of its own.")
    try:
        model = get_peft_model(base, config, adapter_name=name)
        with torch.no_grad():
            _fill(base, name, downs, ups, scales, others)
    except BaseException:
        if (seam := Seam.of(base)) is not None:
            unwrap(base)
            remove(seam)
        if isinstance(source, PeftModel):
            _put_back(source, name, weights, scales)
        raise
    return model.train(source.training) if isinstance(source, PeftModel) else model


def _fill(
    base: Any,
    adapter: str,
    downs: dict[str, Tensor],
    ups: dict[str, Tensor],
    scales: dict[str, float],
    others: dict[str, Tensor],
) -> None:
    """Let the fresh ``adapter`` compute what the LoRA did."""
    seam = Seam.require(base)
    for encoder in (module for module in base.modules() if isinstance(module, PTEEncoder)):
        _start(encoder, adapter)
    linears = {key: module for key, module in base.named_modules() if isinstance(module, PTELinear)}
    _require_same(set(downs), set(linears))
    for key, linear in linears.items():
        widths = ups[key].shape[0], downs[key].shape[1]
        if widths != (linear.out_features, linear.in_features):
            raise ValueError(
                f"The LoRA's `{key}` must be of the base model's size, {(linear.out_features, linear.in_features)} (out, in), got {widths}. Was it "
                "trained on another base model?"
            )
        state = seam.encoder(linear.layer_index).initial_state(adapter)
        _carry(linear, adapter, scales[key], downs[key], ups[key], state)
    _carry_modules(base, adapter, others)


def _layers(source: PeftModel) -> list[tuple[str, LoraLayer]]:
    return [(key, module) for key, module in source.base_model.model.named_modules() if isinstance(module, LoraLayer)]


def _put_back(source: PeftModel, adapter: str, weights: dict[str, Tensor], scales: dict[str, float]) -> None:
    """Give ``source`` its LoRA again."""
    source.base_model.inject_adapter(source.base_model.model, adapter)
    set_peft_model_state_dict(source, weights, adapter_name=adapter)
    for key, layer in _layers(source):
        layer.scaling[adapter] = scales[key]
        layer.train(source.training)


def _folder(source: str, subfolder: str | None, revision: str | None) -> str:
    """Where a saved LoRA lies, fetched from the hub where ``source`` is no folder."""
    root = source
    if not os.path.isdir(source):
        # Not by peft's loader, which looks for the subfolder within the subfolder where the hub cannot be reached.
        wanted = os.path.join(subfolder or "", "adapter_*").replace(os.sep, "/")
        root = snapshot_download(source, revision=revision, allow_patterns=wanted)
    elif revision is not None:
        raise ValueError(f"`revision` must be None where `source` is a folder, got {revision!r}. Leave it out.")
    folder = os.path.join(root, subfolder or "")
    if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise ValueError(
            f"`source` must hold a saved adapter, got {source!r} without {os.path.join(subfolder or '', CONFIG_NAME)!r}. Give `subfolder` where the adapter "
            "is not at the top."
        )
    return folder


def _of_model(source: PeftModel) -> tuple[str, LoraConfig, dict[str, Tensor]]:
    """Name, config and weights of its LoRA."""
    if len(source.peft_config) > 1:
        raise ValueError(
            f"`source` must have one adapter, got {sorted(source.peft_config)}. Remove the others with delete_adapter, or save the LoRA and give its folder."
        )
    name, config = next(iter(source.peft_config.items()))
    lora = _checked(config)
    if any(module.merged for module in source.modules() if isinstance(module, LoraLayer)):
        raise ValueError("`source` must not be merged into its base model. Call unmerge_adapter() first.")
    off = [
        path
        for path, module in source.named_modules()
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper))
        and (module.disable_adapters or name not in module.active_adapters)
    ]
    if off:
        raise ValueError(
            f"`source` must have its LoRA switched on, got {len(off)} layers where it is off, as `{off[0]}`: the PTE adapter would be on there. Call "
            f"source.base_model.enable_adapter_layers() and source.set_adapter({name!r}), or leave layers out for good, with exclude_modules."
        )
    weights = get_peft_model_state_dict(source, adapter_name=name, save_embedding_layers=False)
    return name, lora, {key: value.clone() for key, value in weights.items()}


def _unloaded(source: PeftModel) -> Any:
    """The base model as it was before the LoRA."""
    # `unload` leaves the trained copies in the place of what they copied.
    originals = {
        name: module.original_module
        for name, module in source.base_model.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = source.unload()
    for name, module in originals.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module)
    return base


def _named(lora: LoraConfig) -> Any:
    """The base model that the config names."""
    if lora.base_model_name_or_path is None:
        raise ValueError("`base` must be given: the LoRA's config names no base model. Load it and pass it.")
    # Its import takes longer than that of all of this package.
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(lora.base_model_name_or_path, revision=lora.revision, dtype="auto")


def _checked(config: PeftConfig) -> LoraConfig:
    """``config`` where PTE can do what it says.

    Raises:
        TypeError: It is no LoRA's.
        ValueError: PTE cannot.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise TypeError(
            f"`source` must hold a LoRA, got {config.peft_type}. Start from nothing: get_peft_model(base, PTEConfig(...))."
        )
    fresh = LoraConfig()
    for name, reason in LACKING.items():
        value = getattr(config, name, None)
        if name not in _SEEN_ELSEWHERE and value not in (None, getattr(fresh, name, None)):
            raise ValueError(f"The LoRA must not have `{name}`, got {value!r}, to be converted. {reason}")
    start = config.init_lora_weights
    if start not in _HARMLESS_STARTS:
        raise ValueError(
            f"The LoRA must not have changed its base model, got init_lora_weights={start!r}. Turn it into a plain one first: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
        )
    return config


def _parts(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """LoRA's ``A`` and ``B`` by linear, and what else was trained, by parameter."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix(_PREFIX)
        for part, found in (("lora_A", downs), ("lora_B", ups)):
            if name.endswith(f".{part}.weight"):
                found[name.removesuffix(f".{part}.weight")] = value
                break
        else:
            others[name] = value
    if strange := [name for name in others if ".lora_" in name]:
        raise ValueError(
            f"The LoRA must sit on linear layers alone to be converted, got {strange[0]}. Train embeddings in full, with modules_to_save."
        )
    return downs, ups, others


def _config(lora: LoraConfig, downs: dict[str, Tensor], fields: dict[str, Any]) -> PTEConfig:
    if clash := [name for name in fields if name in _FIXED or name in RENAMED]:
        raise ValueError(
            f"`{clash[0]}` must be left out: it is the LoRA's. Convert, and change a copy of the config afterwards."
        )
    rank = fields.pop("r", None) or lora.r
    largest = max([rank, *(down.shape[0] for down in downs.values())])
    tokens = fields.pop("num_global_tokens", None)
    tokens = max(32, largest) if tokens is None else tokens
    if rank < lora.r:
        raise ValueError(f"`r` must be at least the LoRA's, {lora.r}, got {rank}. Leave it out.")
    if tokens < largest:
        raise ValueError(
            f"`num_global_tokens` must be at least the largest rank, {largest}, got {tokens}. Leave it out."
        )
    wider = rank / lora.r
    factor = math.sqrt(wider) if lora.use_rslora else wider
    carried = {name: getattr(lora, name) for name in _CARRIED}
    patterns = {
        "rank_pattern": {key: max(value, rank) for key, value in (lora.rank_pattern or {}).items()},
        "alpha_pattern": {key: value * factor for key, value in (lora.alpha_pattern or {}).items()},
    }
    return PTEConfig(
        **{**carried, **patterns, "r": rank, "alpha": lora.lora_alpha * factor, "num_global_tokens": tokens, **fields}
    )


def _scale(lora: LoraConfig, name: str) -> float:
    """LoRA's own factor on the linear ``name``."""
    ranks, alphas = lora.rank_pattern or {}, lora.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks, name), lora.r)
    alpha = alphas.get(get_pattern_key(alphas, name), lora.lora_alpha)
    return float(alpha / (math.sqrt(rank) if lora.use_rslora else rank))


def _require_same(lora: set[str], pte: set[str]) -> None:
    if lora != pte:
        names = sorted(lora ^ pte)
        raise ValueError(
            f"The LoRA's linears must be those that PTE adapts, got {len(names)} that only one of them has, as {names[0]!r}. Experts in one tensor "
            "(`target_parameters`) cannot be carried; or was it trained on another base model?"
        )


def _start(encoder: PTEEncoder, adapter: str) -> None:
    """Give the encoder an ``S0`` of which every part can be read: global tokens that are told apart by the projections.

    The projections share ``R`` directions that are at right angles; each of the first global tokens lies in one of them, and the others anywhere
    among them. Lengths are about those of a fresh encoder.
    """
    settings = encoder.settings[adapter]
    if settings.state_update == "off":
        return
    if settings.empty_start:
        raise ValueError(
            "`num_global_tokens` must be above 0 to carry a LoRA, whose adapters would read an empty state. Leave it out."
        )
    width, rank = min(encoder.key_width, encoder.value_width), settings.rank
    square = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    more = nn.functional.normalize(torch.randn(max(rank - width, 0), width, dtype=torch.float64), dim=1)
    directions = torch.cat([square, more])[:rank]
    shares = torch.eye(settings.num_queries, rank, dtype=torch.float64)
    beyond = nn.functional.normalize(torch.randn(settings.num_queries, rank, dtype=torch.float64), dim=1)
    shares[rank:] = beyond[rank:]
    tokens = math.sqrt(rank) * shares @ directions
    weight_of(encoder.pte_global_tokens[adapter]).zero_()[:, :width].copy_(tokens)
    for projection in (encoder.pte_query, encoder.pte_key, encoder.pte_value):
        # What is lost moves the state little at first, and with it the LoRA; S0, whose rows have one length, is the same.
        share = 0.1 if projection is encoder.pte_value else 1.0
        weight_of(projection[adapter]).zero_()[:, :width].copy_(share * directions / math.sqrt(3))


def _carry(linear: PTELinear, adapter: str, scale: float, down: Tensor, up: Tensor, state: Tensor) -> None:
    """Let ``linear`` compute ``scale * up @ down`` while it reads ``state``, ``S0 [Q, R]``."""
    # On the CPU, because not every device has float64.
    told = linear._told(state, adapter).double().cpu()
    rank = down.shape[0]
    read = told[:, :rank]
    if torch.linalg.matrix_rank(read, rtol=1e-4) < rank:
        raise ValueError(
            f"The LoRA's rank must be at most the width of what a layer caches, got {rank} on `{linear.name}`: no state tells so much apart. Reduce its "
            "rank first, as with truncated SVD."
        )
    wanted = scale / linear.scale[adapter] * up.double().cpu()
    weight_of(linear.pte_down[adapter]).zero_()[:rank].copy_(down)
    weight_of(linear.pte_up[adapter]).copy_(wanted @ torch.linalg.pinv(read))


def _carry_modules(base: nn.Module, adapter: str, others: dict[str, Tensor]) -> None:
    """Copy what was trained in full, and embeddings that were saved because the vocabulary had been resized."""
    for name, value in others.items():
        path, _, parameter = name.rpartition(".")
        try:
            module = base.get_submodule(path)
            inner = module.modules_to_save[adapter] if isinstance(module, ModulesToSaveWrapper) else module
            held = getattr(inner, parameter)
            if inner is module:
                warnings.warn(
                    f"The LoRA was saved with `{name}` of its base model, which is copied. Save what comes of it with save_embedding_layers=True.",
                    UserWarning,
                    stacklevel=4,
                )
        except AttributeError as error:
            raise ValueError(
                f"The LoRA was saved with `{name}`, which the base model lacks. Give the base model that it was trained on."
            ) from error
        if held.shape != value.shape:
            raise ValueError(
                f"The LoRA was saved with `{name}` of shape {tuple(value.shape)}, and the base model's is {tuple(held.shape)}. Call "
                "base.resize_token_embeddings(...) first."
            )
        held.copy_(value)
