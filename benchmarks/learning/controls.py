"""Controls of a state: evictions of another sequence, and a state that stays what it was at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.state import Evicted


@contextmanager
def swapped_evictions(model: nn.Module) -> Iterator[None]:
    """Within the block, every sequence's encoders read the keys and values that its neighbour in the batch lost."""

    def swap(encoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        adapter, state, evicted, *times = args
        return adapter, state, Evicted(*(None if part is None else part.roll(1, dims=0) for part in evicted)), *times

    with _hooked(model, lambda encoder: encoder.register_forward_pre_hook(swap)):
        yield


@contextmanager
def frozen_state(model: nn.Module) -> Iterator[None]:
    """Within the block, states stay ``S0``."""

    def keep(encoder: nn.Module, args: tuple[Any, ...], states: Tensor) -> Tensor:
        return args[1][:, None].expand_as(states)

    with _hooked(model, lambda encoder: encoder.register_forward_hook(keep)):
        yield


CONTROLS = {"swapped_evictions": swapped_evictions, "frozen_state": frozen_state}


@contextmanager
def _hooked(model: nn.Module, register: Callable[[PTEEncoder], Any]) -> Iterator[None]:
    hooks = [register(module) for module in model.modules() if isinstance(module, PTEEncoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
