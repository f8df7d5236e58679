"""Running a part of a model again in the backward pass, from the same start, without keeping the start twice.

A checkpoint of torch keeps the tensors it is given as arguments, and lets an enclosing checkpoint or an offloading hook
decide how. What is hidden in an object or a closure it keeps for good. So a cache, or one layer of it, is taken apart
(:class:`Parts`), its tensors are passed as arguments, and it is put together again inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..cache.cache import PTECache
from ..cache.store import Place


class Parts:
    """Tensors, and a form with places for them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def take(self, part: Any) -> Any:
        """Note a tensor and give its place; anything else is returned as it is."""
        if not isinstance(part, Tensor):
            return part
        self.tensors.append(part)
        return Place(len(self.tensors) - 1)


def filling(tensors: tuple[Tensor, ...]) -> Callable[[Any], Any]:
    """What puts ``tensors`` back into their places."""
    return lambda part: tensors[part.index] if isinstance(part, Place) else part


def recomputed(
    function: Callable[[PTECache, dict[str, Any]], tuple[Any, PTECache]], cache: PTECache, inputs: dict[str, Any]
) -> tuple[Any, PTECache]:
    """``function(cache, inputs)``, to be run again in the backward pass; returns its output and what the cache became."""
    parts = Parts()
    leaves, spec = tree_flatten(inputs)
    places = [parts.take(_without_hook(leaf)) for leaf in leaves]
    form = cache.fork()
    form.map_parts(parts.take)

    def run(*tensors: Tensor) -> tuple[Any, PTECache]:
        fill = filling(tensors)
        start = form.fork()
        start.map_parts(fill)
        return function(start, tree_unflatten([fill(place) for place in places], spec))

    result: tuple[Any, PTECache] = checkpoint(run, *parts.tensors, use_reentrant=False)
    return result


def _without_hook(leaf: Any) -> Any:
    """``leaf``, detached where a trainer's hook made the embeddings a leaf that requires a gradient nobody reads."""
    if isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad and not isinstance(leaf, nn.Parameter):
        return leaf.detach()
    return leaf


class Offload:
    """Keeps what a checkpoint saves on the CPU, each storage once however many checkpoints share it."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Tensor]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """Within the block, the hidden vectors, keys and values that autograd saves go to the CPU."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        # The rest is small (states, positions) or stays on the device anyway (weights).
        if tensor.ndim < 3 or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        copy, known = None, self._copies.get(reference.cdata)
        if known is not None and not known[0].expired():
            copy = known[1]
        if copy is None:
            elements = storage.nbytes() // tensor.element_size()
            copy = torch.empty(elements, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy.copy_(tensor.detach().as_strided((elements,), (1,), 0), non_blocking=True)
            self._copies[reference.cdata] = (reference, copy)
        return _Parked(copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), tensor.device)


@dataclass(frozen=True)
class _Parked:
    values: Tensor
    device: torch.device


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Parked):
        return packed.values.to(packed.device, non_blocking=True, copy=True)
    tensor: Tensor = packed
    return tensor
