"""What a compiled step of decoding reads, at addresses that stay: states, the slot to write, the tokens seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..method.state import LayerState, Stacked, ThoughtState
from .store import Step, at_address


class FixedAddresses:
    """Written between two steps, read in a step.

    Attributes:
        states: By layer, what its adapters read: ``[B, Q, R]`` in the dtype they compute in.
        ready: Whether the next call is a step that was prepared, with a mask over the slots: a caller's own 4D mask is not one.
        stale: Whether the states of the cache have moved on without those that are read here.
        downs: By layer, weights of linears that read the same input.
        positions: ``[B, 1]``, where the tokens of the step stand, for hosts that do not hand them on.
    """

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        self.downs: dict[int, dict[str, Stacked]] = {}
        self._written: dict[tuple[int, str], Stacked] = {}
        self.ready, self.stale = False, True
        self.positions: Tensor | None = None
        self._stacked: dict[tuple[int, ...], Tensor] = {}
        self._written_at: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._counters: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def counters(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
        """On ``device``: the slot that each row writes, ``[B]``, and the tokens seen."""
        held = self._counters.get(device)
        if held is None or held[0].shape[0] != batch:
            held = (
                torch.zeros(batch, dtype=torch.long, device=device),
                torch.zeros((), dtype=torch.long, device=device),
            )
            for counter in held:
                torch._dynamo.mark_static_address(counter)
            self._counters[device] = held
        return held

    def written(self, step: Step, device: torch.device) -> tuple[Tensor, Tensor]:
        """On ``device``: the slot of the window that each row writes in a ``step``, ``[B]``, and its position, ``[B]``."""
        held = self._written_at.get(device)
        if held is None or held[0].shape != step.write.shape:
            held = self._written_at[device] = (
                step.write.to(device, copy=True),
                step.positions.to(device, copy=True),
            )
            for part in held:
                torch._dynamo.mark_static_address(part)
        else:
            held[0].copy_(step.write)
            held[1].copy_(step.positions)
        return held

    def all_counters(self) -> Iterator[tuple[torch.device, tuple[Tensor, Tensor]]]:
        """The same, on every device."""
        yield from self._counters.items()

    def write_positions(self, positions: Tensor) -> None:
        """Let the tokens of the step stand at ``positions [B, 1]``."""
        if (
            self.positions is None
            or self.positions.shape != positions.shape
            or self.positions.device != positions.device
        ):
            self.positions = positions.clone(memory_format=torch.contiguous_format)
            torch._dynamo.mark_static_address(self.positions)
        else:
            self.positions.copy_(positions)

    def write_downs(self, index: int, downs: dict[str, Stacked]) -> None:
        """Let ``downs`` be what the linears of a layer share."""
        held = self.downs.get(index, {})
        if held.keys() != downs.keys():
            held = self.downs[index] = {}
        for name, stacked in downs.items():
            known = held.get(name)
            if self._written.get((index, name)) is stacked:
                continue
            self._written[index, name] = stacked
            if known is not None and known.names == stacked.names and _kind(known.down) == _kind(stacked.down):
                known.down.copy_(stacked.down)
            else:
                held[name] = stacked
                torch._dynamo.mark_static_address(stacked.down)

    def write_state(self, state: ThoughtState, index: int, value: Tensor, dtype: torch.dtype) -> None:
        """Let ``value [B, Q, R]`` be the state of a layer, and what its adapters read."""
        read = self.states.get(index)
        state.layers[index] = LayerState(value.contiguous())
        if read is not None and read.shape == value.shape:
            read.copy_(value)
            return
        self.states[index] = value.to(dtype=dtype, copy=True)
        torch._dynamo.mark_static_address(self.states[index])

    def stacked(self, state: ThoughtState, indices: tuple[int, ...]) -> Tensor:
        """The states of the layers ``indices`` as one tensor ``[L, B, Q, R]``, of which each becomes a view."""
        known = self._stacked.get(indices)
        values = [value for index in indices if (value := state.layers[index].value) is not None]
        if known is None or any(
            value.data_ptr() != known[place].data_ptr() or value.shape != known[place].shape
            for place, value in enumerate(values)
        ):
            known = self._stacked[indices] = torch.stack(values)
            for place, index in enumerate(indices):
                state.layers[index] = LayerState(known[place])
        return known

    def map(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device."""
        self.states = {index: at_address(part, function(part)) for index, part in self.states.items()}
        self._stacked = {}


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
