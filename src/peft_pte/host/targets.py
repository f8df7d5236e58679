"""Which linears of the decoder layers an adapter sits on where none are named, and why not on the others."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import PTEConfig
from ..method.layer import is_linear
from ..shapes import whole_shape
from .sites import Sites, site_of

# Classes of linear layers that choose experts instead of computing features.
_ROUTERS = ("Router", "TopK", "Gate")
# The same of what holds one.
_ROUTERS_OWNERS = ("Router", "TopK")


def default_targets(model: nn.Module, sites: Sites, config: PTEConfig) -> set[str]:
    """Names of all linear layers of the decoder layers that compute features of their tokens, adapted already or not.

    The last part of a name stands for all of them where no other linear of the model has it.
    """
    wanted: set[str] = set()
    for name, module in _linears(model):
        site = site_of(sites, name)
        numbers = config.layers_to_transform
        chosen = numbers is None or site is None or site.index in ([numbers] if isinstance(numbers, int) else numbers)
        if site is not None and chosen and why_not(model, name, module, sites) is None:
            wanted.add(name)
    taken = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in wanted}
    return {name if last in taken else last for name in wanted for last in (name.rpartition(".")[2],)}


@dataclass(frozen=True)
class LeftOut:
    """Weights of the decoder layers that no adapter of the default targets sits on."""

    parameters: int
    reason: str


def left_out(model: nn.Module, sites: Sites) -> dict[str, LeftOut]:
    """What of the decoder layers the default targets leave as it is, vectors apart, by name within a layer."""
    linears = dict(_linears(model))
    found: dict[str, LeftOut] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0].removesuffix(".base_layer")
        site = site_of(sites, owner)
        shape = whole_shape(parameter)
        if site is None or len(shape) < 2 or ".pte_" in name:
            continue
        module = linears.get(owner)
        reason = why_not(model, owner, module, sites) if module is not None else _NO_LINEAR[len(shape) > 2]
        if reason is not None:
            short = re.sub(r"\.\d+\.", ".N.", name[len(site.block) + 1 :].replace(".base_layer", ""))
            before = found[short].parameters if short in found else 0
            found[short] = LeftOut(before + math.prod(shape), reason)
    return found


_NO_LINEAR = {False: "no linear layer", True: "in one tensor, as experts and convolutions are"}


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, those below adapters under the name of what they adapt."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
            module = module.get_base_layer() if hasattr(module, "base_layer") else module
        if is_linear(module):
            yield name, module


def why_not(model: nn.Module, name: str, module: nn.Module, sites: Sites) -> str | None:
    """Why a linear is no default target; ``None``: it is, since it computes features of the tokens that it is called with."""
    parent, _, last = name.rpartition(".")
    owner = type(model.get_submodule(parent))
    if any(word in type(module).__name__ for word in _ROUTERS) or any(
        word in owner.__name__ for word in _ROUTERS_OWNERS
    ):
        return "chooses experts"
    if name in sites.readers:
        return (
            "gets other rows than one per token: it reads what is cached, or parts of a token, and no state is its own"
        )
    if name.startswith(sites.idle or (" ",)):
        return "cross-attention, which text does not reach"
    if re.search(rf"self\.{re.escape(last)}\.(weight|bias)\b(?!\.(dtype|device|shape))", _source(owner)):
        return f"{owner.__name__} reads its weight without calling it"
    return None


_sources: dict[type, str] = {}


def _source(owner: type) -> str:
    if owner not in _sources:
        try:
            lines = inspect.getsource(owner)
        except (OSError, TypeError):
            lines = ""
        _sources[owner] = lines
    return _sources[owner]
