"""The queries of an attention layer, as its attention takes them: through transformers' attention interface.

A model looks up by a name of its config what computes its attention (`AttentionInterface`). While a layer is watched its attention module
gives a name of ours, behind which the queries are shown to the layer of the cache; what the model was loaded with computes then. Nothing
else sees the name: masks are made by the config of the model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..cache.store import ThoughtLayer
from .compat import ATTENTION_NAME, ATTENTION_TABLE, EAGER_ATTENTION, UPCAST_ATTENTION

_WATCHED = "peft_pte_watched"


class _Watching(threading.local):
    """The layer of the cache that is shown the queries of what runs on this thread."""

    layer: Any = None
    shown: int = 0


_watching = _Watching()


class WatchedConfig:
    """The config of an attention module, but for the name of its attention while that is watched."""

    def __init__(self, config: Any) -> None:
        self.__dict__["host"] = config

    @property
    def _attn_implementation(self) -> Any:
        return getattr(self.host, ATTENTION_NAME) if _watching.layer is None else _WATCHED

    def __getattr__(self, name: str) -> Any:
        if name == "host":
            raise AttributeError(name)
        return getattr(self.host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.host, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return WatchedConfig, (self.host,)


def can_be_watched(attention: nn.Module) -> bool:
    """Whether a module looks its attention up by name."""
    forward = inspect.unwrap(type(attention).forward)
    looks_up = ATTENTION_TABLE in forward.__globals__ and "get_interface" in forward.__code__.co_names
    return looks_up and hasattr(attention, "config") and not getattr(attention, UPCAST_ATTENTION, False)


def make_watchable(attention: Any) -> None:
    """Let the queries of a module be seen where they are asked for."""
    if not isinstance(attention.config, WatchedConfig):
        attention.config = WatchedConfig(attention.config)


def give_back(attention: Any) -> None:
    """Undo :func:`make_watchable`."""
    if isinstance(getattr(attention, "config", None), WatchedConfig):
        attention.config = attention.config.host


@contextmanager
def watch(layer: Any) -> Iterator[None]:
    """Within the block, on this thread, ``layer`` of the cache is shown the queries of what attends, if it wants them.

    Raises:
        NotImplementedError: It wants them, and attention was not looked up, or more than once.
    """
    if not (isinstance(layer, ThoughtLayer) and layer.watched):
        yield
        return
    before, shown = _watching.layer, _watching.shown
    _watching.layer, _watching.shown = layer, 0
    try:
        yield
        if _watching.shown != 1 and not torch.compiler.is_compiling():
            raise NotImplementedError(
                f"The attention of layer {layer.index} went {_watching.shown} times through transformers' attention interface, so its queries are not "
                "known. Use "
                'eviction="key_diff", "random" or "sliding_window" for this model.'
            )
    finally:
        _watching.layer, _watching.shown = before, shown


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the model attends with, behind a look at the queries."""
    layer = _watching.layer
    names = inspect.unwrap(type(module).forward).__globals__
    if layer is not None:
        layer.observe(query, kwargs.get("scaling"), kwargs.get("softcap"))
        _watching.shown += 1
    config = module.config.host if isinstance(module.config, WatchedConfig) else module.config
    computes = names[ATTENTION_TABLE].get_interface(getattr(config, ATTENTION_NAME), names.get(EAGER_ATTENTION))
    return computes(module, query, key, value, *args, **kwargs)


AttentionInterface.register(_WATCHED, _attend)
