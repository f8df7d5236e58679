"""A saved adapter is opened whole or not at all: it is checked before any weight is touched.

Every loader ends in one of two places. peft's own (``PeftModel.from_pretrained``, ``load_adapter``, a Trainer that resumes,
``set_peft_model_state_dict``) asks :class:`peft_pte.PTEModel` for the names, and that is where the check sits. transformers'
(``model.load_adapter``, ``from_pretrained`` of an adapter folder) asks nobody, knows nothing of the place of an encoder, and only
logs what is missing: it calls ``model._load_pretrained_model`` once the fresh adapter is in place, which :func:`watch` covers on
the instance.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_utils import load_state_dict

from ..config import PTEConfig
from ..host.compat import LOADER_METHOD
from ..method.encoder import CHILD_NAME, PTEEncoder
from ..method.layer import PTELayer, PTELinear
from ..seam import Seam
from ..shapes import whole_shape
from .install import remove

_SHOWN = 3
_PEFT_PREFIX = "base_model.model."
_ENCODER_PARTS = "|".join(PTEEncoder.adapter_layer_names)


def check_adapter_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Compare what a file holds with what the adapter ``adapter_name`` of ``model`` is made of.

    Args:
        model: The adapted model, already holding the adapter's (fresh) weights.
        adapter_name: The adapter to load into.
        state_dict: Tensors by parameter name.
        prefix: What the names of the adapter's modules start with.

    Raises:
        ValueError: A tensor is missing, unexpected, of another shape, or not finite.
    """
    of_adapter = re.compile(rf"\.(?:{re.escape(prefix)}\w+|modules_to_save)\.{re.escape(adapter_name)}\.")
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    # peft strips this prefix later where the model has none.
    found = {name if name in held else name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state_dict.items()}
    missing = {name for name in held if of_adapter.search(name)} - found.keys()
    _refuse("is missing", missing, "The file is incomplete, or of another configuration")
    _refuse(
        "is in the file and not in the model",
        found.keys() - held.keys(),
        "The adapter was made for a model with other layers, or with other target_modules",
    )
    # peft writes the embeddings too where the vocabulary has been resized.
    own = {name for name in found if of_adapter.search(name)} | _embeddings(model, held)
    _refuse("belongs to the base model", found.keys() - own, "A file of an adapter holds its own tensors alone")
    shapes = [
        f"{name} (file {tuple(tensor.shape)}, model {whole_shape(held[name])})"
        for name, tensor in found.items()
        if tuple(tensor.shape) != whole_shape(held[name])
    ]
    _refuse("has another shape", shapes, "The adapter was made for a base model of other widths, or another rank")
    broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    _refuse("is not finite", broken, "The file is corrupt, or the training that wrote it diverged")


def _embeddings(model: nn.Module, held: dict[str, Tensor]) -> set[str]:
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    modules = [module for getter in getters if getter is not None and (module := getter()) is not None]
    weights = {id(weight) for module in modules for weight in module.parameters()}
    return {name for name, tensor in held.items() if id(tensor) in weights}


def _refuse(what: str, names: Iterable[str], why: str) -> None:
    names = sorted(names)
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(
        f"The adapter cannot be loaded, and no weight was changed: {', '.join(names[:_SHOWN])}{more} {what}. {why}."
    )


@dataclass(frozen=True)
class _Before:
    """A model as it was before an adapter was injected."""

    active: list[str]
    trainable: frozenset[str]


def watch(model: nn.Module, adapter_name: str, prefix: str) -> None:
    """Have what transformers loads into ``adapter_name``, which is about to be injected, checked.

    The instance's ``_load_pretrained_model`` is replaced until it is called, or until :func:`peft_pte.tuner.install.remove`.
    """
    layers = [module for module in model.modules() if isinstance(module, PTELayer)]
    before = _Before(
        active=layers[0].active_adapters if layers else [],
        trainable=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    )
    setattr(model, LOADER_METHOD, functools.partial(_load, adapter_name, prefix, before))


def _load(
    adapter_name: str,
    prefix: str,
    before: _Before,
    model: Any,
    state_dict: dict[str, Tensor] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    expected_keys: list[str] | None = None,
) -> Any:
    """``_load_pretrained_model`` of transformers 5.17 to 5.24, for one adapter; all of it, or the model as it was before."""
    model.__dict__.pop(LOADER_METHOD, None)
    load = functools.partial(getattr(type(model), LOADER_METHOD), model, expected_keys=expected_keys)
    if next(reversed(model.peft_config)) != adapter_name:
        return load(state_dict=state_dict, checkpoint_files=checkpoint_files, load_config=load_config)
    # It keeps the renamings it has used, for saving the base model.
    kept = model.__dict__.get("_weight_conversions")
    try:
        if state_dict is None:
            state_dict = {}
            for file in checkpoint_files or ():
                state_dict.update(load_state_dict(file))
        # transformers has the adapter's name put in; the encoder is one module further in than its names in the file.
        encoder = WeightRenaming(rf"\.({_ENCODER_PARTS})\.", rf".{CHILD_NAME}.\1.")
        renamings = [*(load_config.weight_mapping or ()), encoder]
        names = [entry for entry in renamings if isinstance(entry, WeightRenaming)]
        held = model.state_dict()
        named = {rename_source_key(key, names, [], model.base_model_prefix, held)[0]: key for key in state_dict}
        check_adapter_state_dict(model, adapter_name, {name: state_dict[key] for name, key in named.items()}, prefix)
        return load(
            state_dict=state_dict,
            checkpoint_files=checkpoint_files,
            load_config=replace(load_config, weight_mapping=renamings),
        )
    except BaseException:
        _take_back(model, adapter_name, before)
        raise
    finally:
        model.__dict__.pop("_weight_conversions", None)
        if kept is not None:
            model._weight_conversions = kept


def unwrap(model: nn.Module, saved_modules: bool = True) -> None:
    """Put the linears of ``model`` back in their places, and with ``saved_modules`` what was wrapped to be trained in full."""
    kinds = (PTELinear, AuxiliaryTrainingWrapper) if saved_modules else (PTELinear,)
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds):
            parent, _, child = name.rpartition(".")
            inner = module.base_layer if isinstance(module, PTELinear) else module.original_module
            setattr(model.get_submodule(parent), child, inner)


def _take_back(model: Any, adapter_name: str, before: _Before) -> None:
    """Remove an adapter that could not be loaded; where it was the first, the model is its base model again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of which adapter becomes active: the one that was.
        model.delete_adapter(adapter_name)
    left = getattr(model, "peft_config", {})
    if not any(isinstance(config, PTEConfig) for config in left.values()):
        unwrap(model, saved_modules=not left)
        remove(Seam.require(model))
    elif before.active:
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.set_adapter(before.active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before.trainable)
