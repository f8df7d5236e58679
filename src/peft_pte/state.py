"""The thought state of a batch: per layer ``S [B, Q, R]``, and what was evicted but not encoded yet.

The state belongs to the cache object. A forward pass lends it to the adapters through a thread-local binding, from
:func:`bind` to the end of its block; nothing is kept in a module.

Encoding is lazy: the eviction of a call is over before its first layer runs, but each layer encodes what it lost when
its first adapter reads the state. The weights of an encoder are therefore used inside the forward of their own layer,
which is where sharded training (FSDP, ZeRO-3) has them at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Evicted(NamedTuple):
    """What one layer lost at one eviction."""

    keys: Tensor
    """``[B, G, E, head_dim]``, as cached."""
    values: Tensor
    """``[B, G, E, head_dim]``."""
    positions: Tensor
    """``[B, 1 or G, E]``, absolute positions of the tokens; 1 where all heads lost the same ones."""
    valid: Tensor | None
    """``[B, 1 or G, E]``, False for padding; ``None``: all valid."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Evicted:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor."""
        valid = None if self.valid is None else function(self.valid)
        return Evicted(function(self.keys), function(self.values), function(self.positions), valid)


@dataclass(frozen=True)
class LayerState:
    """The state of one layer; immutable, so that a copy of the list of layers is a copy of the state."""

    value: Tensor | None = None
    """``S [B, Q, R]``, or ``None`` before anything read it (it is ``S0`` then)."""
    pending: tuple[Evicted, ...] = ()
    """Evictions that no adapter has made the layer encode yet, in order."""

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor."""
        return LayerState(
            value=None if self.value is None else function(self.value),
            pending=tuple(evicted.map(function) for evicted in self.pending),
        )


class ThoughtState:
    """The state of every layer of one batch."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[LayerState] = [LayerState() for _ in range(num_layers)]

    def add_pending(self, layer_index: int, evicted: Evicted) -> None:
        """Queue what ``layer_index`` lost; it is encoded when the layer's adapters next read the state."""
        layer = self.layers[layer_index]
        self.layers[layer_index] = replace(layer, pending=(*layer.pending, evicted))

    def fork(self) -> ThoughtState:
        """An independent state with the same content; no tensor is copied."""
        other = ThoughtState(0)
        other.layers = list(self.layers)
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor, in place."""
        self.layers = [layer.map(function) for layer in self.layers]

    def reset(self) -> None:
        """Every sequence starts again at ``S0``."""
        self.layers = [LayerState() for _ in self.layers]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, for counting bytes."""
        for layer in self.layers:
            if layer.value is not None:
                yield layer.value
            for evicted in layer.pending:
                yield from (part for part in evicted if part is not None)

    def norm(self) -> Tensor | None:
        """Mean L2 norm of the rows of ``S`` over layers and sequences, a 0-d tensor; ``None`` before any ``S``."""
        norms = [layer.value.detach().norm(dim=-1).mean() for layer in self.layers if layer.value is not None]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).mean() if norms else None


_bound = threading.local()


class Reading(NamedTuple):
    """What the adapters of one layer read in one forward pass."""

    state: Tensor
    """``S [B * N, Q, R]``: of every sequence, the ``N`` states that its tokens read one after the other."""
    rows: int
    """Sequences ``B``."""
    tokens: int
    """Tokens ``T`` per sequence; each state is read by ``T / N`` of them."""


class StateReader(Protocol):
    """What lends the adapters of one forward pass their states."""

    def __call__(self, layer_index: int) -> Reading:
        """The states of a layer."""


@contextmanager
def bind(reader: StateReader) -> Iterator[None]:
    """Within the block, on this thread, adapters read their states from ``reader``."""
    previous = getattr(_bound, "reader", None)
    _bound.reader = reader
    try:
        yield
    finally:
        _bound.reader = previous


def read_state(layer_index: int) -> Reading:
    """What the adapters of ``layer_index`` read in the pass on this thread.

    Raises:
        RuntimeError: No forward pass of an adapted model runs on this thread.
    """
    reader: StateReader | None = getattr(_bound, "reader", None)
    if reader is None:
        raise RuntimeError(
            "An adapted layer ran outside its model's forward pass, so there is no thought state for it to read. Call "
            "the model (or its backbone) instead of one of its layers."
        )
    return reader(layer_index)
