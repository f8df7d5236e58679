"""The rotary rotation of what a layer caches, found by trying."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..method.rotary import STYLES, Embedding, Frequencies, Rotation, layout_of
from .compat import ROTATES

# Half-precision keys agree to about 1 %; a wrong rotation is off by its own size.
_SAME = 0.05


def find_rotation(
    backbone: nn.Module,
    attention: nn.Module,
    layer_type: str | None,
    heads: tuple[Tensor, Tensor],
    positions: tuple[int, int],
) -> Rotation | None:
    """How one hidden vector's ``heads [1, G, 1, head_dim]`` at two positions were turned; ``None``: not at all.

    Raises:
        LookupError: They differ, and no rotation that the model is known to have makes them equal.
    """
    one, other = heads
    if _apart(one, other) <= 1e-3:
        return None
    found: list[tuple[float, Rotation]] = []
    for rotation in _candidates(backbone, attention, layer_type, one.shape[-1]):
        plain = [
            rotation.remove(part, torch.tensor([[[position]]], device=part.device))
            for part, position in zip(heads, positions, strict=True)
        ]
        error = _apart(*plain)
        if error <= _SAME:
            found.append((error, rotation))
    if not found:
        raise LookupError(
            f"no rotation that {type(backbone).__name__} is known to have gives the keys of {type(attention).__name__} back"
        )
    # In order; a later one only where it fits much better, as slow pairs cannot be told apart.
    best = min(error for error, _ in found)
    return next(rotation for error, rotation in found if error <= 2 * best + 1e-4)


def guess_rotation(backbone: nn.Module, attention: nn.Module, layer_type: str | None) -> Rotation | None:
    """The rotation that the structure of a model without numbers tells: one module, and the function beside the attention's class.

    Raises:
        LookupError: It does not tell.
    """
    sources = list(_embeddings(backbone, attention, layer_type))
    if not sources or not getattr(attention, ROTATES, True):
        return None
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise LookupError(
            f"the rotary code of {type(attention).__name__} is not where it can be read, and its weights are not here to try it"
        )
    # Models are made under a device of their own.
    with torch.device("cpu"):
        angles = torch.arange(1.0, 5.0)
        row, nowhere = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 1)
        for style, laid_out in itertools.product(STYLES, (*STYLES, None)):
            known = Rotation(_Known(angles, laid_out), style, laid_out)
            try:
                _, turned = apply(row, row, *known.source.cos_sin(nowhere[0], row.dtype))
            except (TypeError, RuntimeError):
                continue
            if _apart(known.remove(turned, nowhere), row) <= 1e-4:
                return Rotation(sources[0], style, laid_out)
    raise LookupError(f"the rotary code of {type(attention).__name__} turns its keys in no known style")


class _Known:
    """A source of known angles."""

    scaling: float = 1.0

    def __init__(self, angles: Tensor, laid_out: str | None) -> None:
        self.angles = (
            angles
            if laid_out is None
            else torch.cat([angles] * 2)
            if laid_out == "half"
            else angles.repeat_interleave(2)
        )

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.angles.cos()[None, None], self.angles.sin()[None, None]


def _candidates(backbone: nn.Module, attention: nn.Module, layer_type: str | None, head_dim: int) -> Iterator[Rotation]:
    sources: list[Any] = list(_embeddings(backbone, attention, layer_type))
    for dimensions, base in itertools.product(_rotary_dimensions(backbone, attention, head_dim), _bases(backbone)):
        sources.append(Frequencies(base, dimensions))
    device = next(backbone.parameters()).device
    for source in sources:
        try:
            _, sines = source.cos_sin(torch.tensor([[1]], device=device), torch.float32)
        except (TypeError, RuntimeError, AttributeError, KeyError):
            continue
        for pairs in dict.fromkeys((sines.shape[-1] // 2, sines.shape[-1])):
            try:
                laid_out = layout_of(sines, pairs)
            except ValueError:
                continue
            if not 0 < 2 * pairs <= head_dim:
                continue
            starts = dict.fromkeys((0, head_dim - 2 * pairs))
            for start, style, direction in itertools.product(starts, STYLES, (1, -1)):
                yield Rotation(source, style, laid_out, start, direction)


def _embeddings(backbone: nn.Module, attention: nn.Module, layer_type: str | None) -> Iterator[Embedding]:
    """Modules that make cosines and sines."""
    for module in itertools.chain(attention.modules(), backbone.modules()):
        if "Rotary" not in type(module).__name__:
            continue
        names = list(inspect.signature(module.forward).parameters)
        if "layer_type" not in names:
            yield Embedding(module, None)
        elif layer_type is not None:
            yield Embedding(module, layer_type)


def _rotary_dimensions(backbone: Any, attention: Any, head_dim: int) -> list[int]:
    """How many dimensions may turn."""
    named = [
        getattr(owner, name, None) for owner in (attention, backbone.config) for name in ("rotary_dim", "rotary_ndims")
    ]
    return list(
        dict.fromkeys(int(value) for value in (*named, head_dim) if value and value <= head_dim and value % 2 == 0)
    )


def _bases(backbone: Any) -> list[float]:
    named = [getattr(backbone.config, name, None) for name in ("rope_theta", "rotary_emb_base")]
    return list(dict.fromkeys(float(value) for value in (*named, 10000.0) if value))


def _apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / left.norm().clamp(min=1e-12))
