"""What attention layers cache, and which linears read it: found by letting the model read a few tokens.

A model reads a few tokens and then single ones, at two different positions. What each attention layer is called with for those is kept,
so that it can be tried alone (:mod:`peft_pte.host.rotations`) with whatever arguments it takes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..method.layer import is_linear
from .compat import CACHE

# Tokens that are read at once.
_FEW = 3
# A position far off, for a model that is told of positions; the last one it has, if that is less.
_FAR = 1000


@dataclass
class Cached:
    """What an attention layer hands to its cache for one token, at two positions."""

    keys: tuple[Tensor, Tensor]
    """``[1, G, 1, D_k / G]``, of the same hidden vector."""
    values: tuple[Tensor, Tensor]
    """``[1, G, 1, D_v / G]``."""
    positions: tuple[int, int]


@dataclass
class Trial:
    """What was seen."""

    cached: dict[int, Cached]
    """By layer of the cache."""
    writers: dict[int, nn.Module]
    """Who writes to it."""
    failed: dict[int, str]
    """Why nothing was written, by layer of the cache."""
    readers: frozenset[str]
    """Names of linears below the backbone that read what is cached, so more than the tokens of the call."""
    together: list[list[str]]
    """Names of linears below the backbone that read one and the same tensor, in the order in which they run."""
    token_axes: dict[nn.Module, dict[str, int]]
    """By decoder layer: its inputs that have a token axis, and which it is, counted from the last."""
    masked: set[nn.Module]
    """Decoder layers that get a mask where no token is hidden but later ones."""


class _CapturedError(Exception):
    """Ends a trial as soon as the layer hands its keys to the cache."""


class _Caught:
    """Stands where a cache stands, and keeps the first keys and values that it is given."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise _CapturedError


def has_numbers(module: nn.Module) -> bool:
    """Whether the weights of ``module`` are here (not on the meta device, not sharded away)."""
    return all(parameter.device.type != "meta" and parameter.numel() > 0 for parameter in module.parameters())


def counts_columns(backbone: PreTrainedModel) -> bool:
    """Whether a model takes no positions, and numbers columns by what its cache has seen."""
    return "position_ids" not in inspect.signature(type(backbone).forward).parameters


def try_out(backbone: PreTrainedModel, attentions: dict[int, list[nn.Module]], layers: list[nn.Module]) -> Trial:
    """Let ``backbone``, whose ``attentions`` in decoder ``layers`` may write to a cache, read a few tokens; its weights must be here.

    Raises:
        NotImplementedError: It does not run on a cache of transformers' own classes.
    """
    device = next(backbone.get_input_embeddings().parameters()).device
    told, config = not counts_columns(backbone), cast(Any, backbone.config)
    cache = DynamicCache(config=config)

    def read(tokens: int, position: int, notes: _Notes) -> _Notes:
        where = torch.arange(position, position + tokens, device=device)[None]
        with notes.taken():
            backbone(
                input_ids=torch.arange(2, tokens + 2, device=device)[None],
                use_cache=True,
                **{CACHE: cache},
                **({"position_ids": where} if told else {}),
            )
        notes.position = position
        return notes

    with _undisturbed(backbone):
        try:
            prefill = read(_FEW, 0, _Notes(backbone, {}, layers))
            seen = [read(1, _FEW, _Notes(backbone, attentions, layers))]
            if not told:
                read(_FEW, _FEW + 1, _Notes(backbone, {}, []))
            far = min(_FAR, _last_position(backbone)) if told else 2 * _FEW + 1
            seen.append(read(1, far, _Notes(backbone, attentions, layers)))
        except Exception as error:  # Whatever the host raises, this model cannot be tried; the cause is handed on.
            raise NotImplementedError(
                f"{type(backbone).__name__} cannot be run on transformers' DynamicCache, whose layers PTE bounds "
                f"({type(error).__name__}: {error}). Use LoRA for this model."
            ) from error
        trial = _read(seen)
    for layer in layers:
        if layer in seen[0].inputs and layer in prefill.inputs:
            if prefill.inputs[layer].get("attention_mask") is not None:
                trial.masked.add(layer)
            trial.token_axes[layer] = _token_axes(prefill.inputs[layer], seen[0].inputs[layer], _FEW)
    return trial


def _last_position(backbone: Any) -> int:
    """The last position that a model has, as far as its config tells."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    return next((int(value) for name in names if (value := getattr(backbone.config, name, None))), 512) - 1


def _token_axes(several: dict[str, Any], one: dict[str, Any], tokens: int) -> dict[str, int]:
    """The axis on which each input of several ``tokens`` differs from that of one."""
    axes: dict[str, int] = {}
    for name, value in several.items():
        if name == "attention_mask":
            continue
        parts, single = (part if isinstance(part, (tuple, list)) else (part,) for part in (value, one.get(name)))
        for left, right in zip(parts, single, strict=False):
            if isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim == right.ndim:
                differ = [axis for axis in range(left.ndim) if (left.shape[axis], right.shape[axis]) == (tokens, 1)]
                if len(differ) == 1:
                    axes[name] = differ[0] - left.ndim
    return axes


class _Notes:
    """What happens while one token is read."""

    position = 0

    def __init__(self, backbone: nn.Module, attentions: dict[int, list[nn.Module]], layers: list[nn.Module]) -> None:
        self.backbone, self.attentions, self.layers = backbone, attentions, layers
        self.inputs: dict[nn.Module, dict[str, Any]] = {}
        self.calls: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        self.readers: set[str] = set()
        # With the tensors themselves, or others might come to be known by their ids.
        self.read: dict[tuple[int, int], tuple[Tensor, list[str]]] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within the block, notes are taken."""
        hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        for index, modules in self.attentions.items():
            note = self._note(index)
            hooks.extend(module.register_forward_pre_hook(note, with_kwargs=True) for module in modules)
        for name, module in self.backbone.named_modules():
            if is_linear(module):
                hooks.append(module.register_forward_pre_hook(self._count(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.setdefault(module, _named(module, args, kwargs))

    def _note(self, index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The first that runs: cross-attention of the same layer comes behind.
            self.calls.setdefault(index, (module, args, kwargs))

        return note

    def _count(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                return
            if args[0].shape[:-1].numel() > 1:
                self.readers.add(name)
            if self.attentions:
                self.read.setdefault((id(args[0]), args[0]._version), (args[0], []))[1].append(name)

        return count


def _read(seen: list[_Notes]) -> Trial:
    first, second = seen
    cached: dict[int, Cached] = {}
    writers: dict[int, nn.Module] = {}
    failed: dict[int, str] = {}
    for index, (module, args, kwargs) in first.calls.items():
        _, there_args, there_kwargs = second.calls[index]
        # The same hidden vectors, with all else as it was at either position.
        hidden, alike = _hidden(module, args, kwargs), _stand_in(module)
        try:
            here, there = (
                _written(alike, {**_named(module, *given), **hidden})
                for given in ((args, kwargs), (there_args, there_kwargs))
            )
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            failed[index] = f"{type(error).__name__}: {error}"
            continue
        writers[index] = module
        cached[index] = Cached((here.keys, there.keys), (here.values, there.values), (first.position, second.position))
    together = [names for _, names in first.read.values() if len(names) > 1]
    return Trial(cached, writers, failed, frozenset(first.readers & second.readers), together, {}, set())


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Random numbers as the first argument, which is the hidden vectors whatever it is called."""
    name = next(iter(inspect.signature(module.forward).parameters))
    like = args[0] if args else kwargs[name]
    return {name: torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)}


def _written(module: nn.Module, arguments: dict[str, Any]) -> _Caught:
    """What ``module`` hands to its cache.

    Raises:
        RuntimeError: Nothing.
    """
    caught = _Caught(next((value for value in arguments.values() if isinstance(value, Cache)), None))
    named = {name: caught if isinstance(value, Cache) else value for name, value in arguments.items()}
    try:
        module(**named)
    except _CapturedError:
        wide = torch.float64 if caught.keys.dtype == torch.float64 else torch.float32
        caught.keys, caught.values = caught.keys.to(wide), caught.values.to(wide)
        return caught
    raise RuntimeError("it runs without a cache")


def _stand_in(module: nn.Module) -> nn.Module:
    """``module`` itself, or with several processes one with random weights: some hosts load weights in the first process alone,
    and all have to find the same.
    """
    parameters = list(module.parameters())
    if any(is_traceable_wrapper_subclass(part.data) for part in parameters):
        # Quantised tensors: other numbers cannot be put in their place, and every process loads its own.
        return module
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    empty = any(not bool(part.any()) for part in parameters if part.ndim == 2 and part.is_floating_point())
    if not (several or empty) or not all(part.is_floating_point() for part in parameters):
        return module
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for part in twin.parameters():
        numbers = (
            torch.randn(part.shape, generator=generator) / part.shape[-1] ** 0.5
            if part.ndim > 1
            else torch.rand(part.shape, generator=generator) + 0.5
        )
        part.data = numbers.to(part)
    return twin


@contextmanager
def _undisturbed(backbone: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode, and neither gradients nor random numbers are anybody's."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    # On a CPU bitsandbytes packs the weights of these anew, and for good, when it first reads a token in evaluation mode.
    packing = [module for module in backbone.modules() if type(module).__name__ == "Linear4bit"]
    for module in packing:
        module.training = True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in packing:
            module.training = False
        for module in training:
            module.training = True
