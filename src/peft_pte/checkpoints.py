"""A saved adapter is checked against the model before any weight is touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SHOWN = 3


def check_adapter_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Compare what a file holds with what the adapter ``adapter_name`` of ``model`` is made of.

    Args:
        model: The adapted model, already holding the adapter's (fresh) weights.
        adapter_name: The adapter to load into.
        state_dict: Tensors by parameter name.
        prefix: What the names of the adapter's modules start with.

    Raises:
        ValueError: A tensor is missing, unexpected, of another shape, or not finite.
    """
    expected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".{prefix}" in name and f".{adapter_name}." in name
    }
    # peft strips this prefix later where the model has none.
    found = {
        name if name in expected else name.removeprefix("base_model.model."): tensor
        for name, tensor in state_dict.items()
        if f".{prefix}" in name
    }
    _refuse("is missing", sorted(expected.keys() - found.keys()), "The file is incomplete, or of another configuration")
    _refuse(
        "is in the file and not in the model",
        sorted(found.keys() - expected.keys()),
        "The adapter was made for a model with other layers, or with other target_modules",
    )
    shapes = [
        f"{name} (file {tuple(found[name].shape)}, model {tuple(parameter.shape)})"
        for name, parameter in expected.items()
        if found[name].shape != parameter.shape
    ]
    _refuse("has another shape", shapes, "The adapter was made for a base model of other widths, or another rank")
    broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    _refuse("is not finite", broken, "The file is corrupt, or the training that wrote it diverged")


def _refuse(what: str, names: list[str], why: str) -> None:
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(
        f"The adapter cannot be loaded, and no weight was changed: {', '.join(names[:_SHOWN])}{more} {what}. {why}."
    )
