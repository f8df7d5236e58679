"""The thought state of a batch: per layer ``S [B, Q, R]``.

The state belongs to the cache object. What a layer's adapters read while it runs is lent to them through a thread-local binding, from
:func:`bind` to the end of its block; nothing is kept in a module. A layer encodes what it evicts inside its own forward, which is
where sharded training (FSDP, ZeRO-3) has the weights of its encoder at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.delta import TokenOps


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


@dataclass(frozen=True)
class LayerState:
    """The state of one layer; immutable, so that a copy of the list of layers is a copy of the state."""

    value: Tensor | None = None
    """``S [B, Q, R]``, or ``None`` before anything read it (it is ``S0`` then)."""
    read: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What linears of each kind take of it at one token per row, and by which operations: made once, read at every token."""

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerState, (self.value,)

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor."""
        return LayerState(None if self.value is None else function(self.value))


class Stacked(NamedTuple):
    """Weights of linears that read the same input."""

    names: tuple[str, ...]
    """Of the linears, in the order in which they run."""
    down: Tensor
    """Their ``pte_down``, one above the other."""


class ThoughtState:
    """The state of every layer of one batch."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[LayerState] = list(map(LayerState, [None] * num_layers))

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

    def norms(self) -> Tensor | None:
        """``[L]``, mean L2 norm of the rows of ``S`` over sequences, of the layers that have one; ``None`` before any ``S``."""
        norms = [layer.value.detach().norm(dim=-1).mean() for layer in self.layers if layer.value is not None]
        return torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else None


bound = threading.local()
"""Its ``reading`` is what the adapters of the layer read that runs on this thread."""


@dataclass(slots=True)
class Reading:
    """What the adapters of one layer read in one forward pass."""

    state: Tensor
    """``S [B * N, Q, R]``: of every sequence, the ``N`` states that its tokens read one after the other."""
    rows: int
    """Sequences ``B``."""
    tokens: int
    """Tokens ``T`` per sequence; each state is read by ``T / N`` of them."""
    adapter: str
    """Whose states these are; a layer that runs again in the backward pass has to be the one that it was."""
    read: dict[Any, Any] | None = None
    """:attr:`LayerState.read` where one token per row comes and no gradients are taken; ``None``: elsewhere."""
    operations: TokenOps | None = None
    """What the linear that runs reads with then."""
    downs: dict[str, Stacked] = field(default_factory=dict)
    """By name of the linear that runs first: the weights of those that read what it reads."""
    input: Tensor | None = None
    """What the last of those read."""
    ahead: dict[str, Tensor] = field(default_factory=dict)
    """``[B, .]`` by name: products down of linears that have yet to run, should ``input`` itself be what they get."""


@contextmanager
def bind(reading: Reading | None) -> Iterator[None]:
    """Within the block, on this thread, adapters read ``reading``; ``None``: the layer that runs has none."""
    previous = getattr(bound, "reading", None)
    bound.reading = reading
    try:
        yield
    finally:
        bound.reading = previous


def read_state() -> Reading:
    """What the adapters of the layer read that runs on this thread.

    Raises:
        RuntimeError: No decoder layer of an adapted model runs on this thread.
    """
    reading: Reading | None = getattr(bound, "reading", None)
    if reading is None:
        raise RuntimeError(
            "An adapted layer ran outside its model's forward pass, so there is no thought state for it to read. Call "
            "the model (or its backbone) instead of one of its layers."
        )
    return reading
