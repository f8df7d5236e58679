"""The thought state of a batch: per layer ``S [B, Q, R]``.

The state belongs to the cache object. What a layer's adapters read while it runs is lent to them through a thread-local binding, from
:func:`bind` to the end of its block; nothing is kept in a module. A layer encodes what it evicts inside its own forward, which is
where sharded training (FSDP, ZeRO-3) has the weights of its encoder at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Evicted(NamedTuple):
    """What one layer lost, at one eviction or at several that follow each other."""

    keys: Tensor
    """``[B, G, E, head_dim]``, as cached."""
    values: Tensor
    """``[B, G, E, head_dim]``."""
    positions: Tensor
    """``[B, 1 or G, E]``, absolute positions of the tokens; 1 where all heads lost the same ones."""
    valid: Tensor | None
    """``[B, 1 or G, E]``, False for padding; ``None``: all valid."""


class Departing(NamedTuple):
    """Which tokens leave a window from which all heads lose the same ones."""

    positions: Tensor
    """``[B, 1, E]``, absolute."""
    valid: Tensor | None
    """``[B, 1, E]``, False for padding; ``None``: all valid."""


@dataclass(frozen=True)
class LayerState:
    """The state of one layer; immutable, so that a copy of the list of layers is a copy of the state."""

    value: Tensor | None = None
    """``S [B, Q, R]``, or ``None`` before anything read it (it is ``S0`` then)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor."""
        return LayerState(None if self.value is None else function(self.value))


class ThoughtState:
    """The state of every layer of one batch."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[LayerState] = [LayerState() for _ in range(num_layers)]

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
    adapter: str
    """Whose states these are; a layer that runs again in the backward pass has to be the one that it was."""


@contextmanager
def bind(reading: Reading | None) -> Iterator[None]:
    """Within the block, on this thread, adapters read ``reading``; ``None``: the layer that runs has none."""
    previous = getattr(_bound, "reading", None)
    _bound.reading = reading
    try:
        yield
    finally:
        _bound.reading = previous


def read_state() -> Reading:
    """What the adapters of the layer read that runs on this thread.

    Raises:
        RuntimeError: No decoder layer of an adapted model runs on this thread.
    """
    reading: Reading | None = getattr(_bound, "reading", None)
    if reading is None:
        raise RuntimeError(
            "An adapted layer ran outside its model's forward pass, so there is no thought state for it to read. Call "
            "the model (or its backbone) instead of one of its layers."
        )
    return reading
