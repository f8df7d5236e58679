"""The model as a measurement wants it for a while: in evaluation mode, or as its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block nothing drops out; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base: no adapter, no trained copy of a module, its own cache.

    Unlike ``disable_adapter`` of peft it needs no ``PeftModel``, and lets no parameter learn afterwards that did not before.
    """
    parts = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [part for part in parts if not part.disable_adapters]
    for part in enabled:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part in enabled:
            part._disable_adapters = False
