"""Keys without their rotary rotation.

A rotation by ``theta`` is undone by one by ``-theta``; cosines and sines that carry an attention scaling ``a`` (YaRN) are divided by
``a ** 2``, since ``a R(-theta) / a**2`` undoes ``a R(theta)``. Which pairs of dimensions turn, by which cosines, and in which direction is
found by trying (:mod:`peft_pte.host.rotations`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ops.compress import rotate


class Source(Protocol):
    """What makes the cosines and sines of a rotation."""

    @property
    def scaling(self) -> float:
        """The factor that they carry."""

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[N, T, n]``, of each dimension or of each pair, at ``positions [N, T]``."""


@dataclass(frozen=True)
class Embedding:
    """The module of a model that makes cosines and sines."""

    module: nn.Module
    layer_type: str | None
    """What it is told of the layer; ``None``: nothing."""

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As the module makes them, at ``positions [N, T]``: ``[N, T, n]``, of each dimension or of each pair."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        made = (
            self.module(like, positions) if self.layer_type is None else self.module(like, positions, self.layer_type)
        )
        # Where layers are spread over devices, the module is on one of them.
        if isinstance(made, Tensor):
            made = made.to(positions.device)
            return made.real.to(dtype), made.imag.to(dtype)
        cos, sin = made
        return cos.to(positions.device), sin.to(positions.device)

    @property
    def scaling(self) -> float:
        """The factor that they carry."""
        name = "attention_scaling" if self.layer_type is None else f"{self.layer_type}_attention_scaling"
        return float(getattr(self.module, name, 1.0))


@dataclass(frozen=True)
class Frequencies:
    """The frequencies ``base ** (-2 i / dimensions)`` of a model that makes cosines and sines inside of its attention."""

    base: float
    dimensions: int

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[N, T, dimensions / 2]`` at ``positions [N, T]``."""
        exponents = torch.arange(0, self.dimensions, 2, device=positions.device).float() / self.dimensions
        angles = positions[..., None].float() / self.base**exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @property
    def scaling(self) -> float:
        """1: they carry no factor."""
        return 1.0


@dataclass(frozen=True)
class Rotation:
    """How a layer turns the heads that it caches."""

    source: Source
    style: str
    """Which of the ``2 n`` dimensions that turn are a pair: ``"half"`` (``i`` and ``i + n``) or ``"interleaved"`` (``2 i`` and ``2 i + 1``)."""
    laid_out: str | None = None
    """How cosines come from the source: by dimension, in one of the styles; ``None``: one of each pair."""
    start: int = 0
    """First dimension that turns."""
    direction: int = 1
    """-1 where pairs turn the other way round."""

    def remove(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Heads as they were before the rotation.

        Args:
            heads: ``[B, G, E, head_dim]``, rotated, in float32 or float64.
            positions: ``[B, 1 or G, E]``, where each token stood.

        Returns:
            ``[B, G, E, head_dim]``.
        """
        batch, groups, evicted = positions.shape
        cos, sin = self.inverse_cos_sin(positions.reshape(batch * groups, evicted), heads.dtype)
        cos, sin = (part.view(batch, groups, evicted, -1) for part in (cos, sin))
        plain = rotate(heads[..., self.start :], cos, sin, self.style)
        return torch.cat([heads[..., : self.start], plain], dim=-1) if self.start else plain

    def inverse_cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, T, 2 n]`` that undo the rotation at ``positions [N, T]``."""
        square = self.source.scaling**2
        cos, sin = (self._by_dimension(part) for part in self.source.cos_sin(positions, dtype))
        return cos / square, sin * (-self.direction / square)

    def _by_dimension(self, part: Tensor) -> Tensor:
        """``[.., 2 n]`` of each dimension, from what the source made."""
        if self.laid_out == self.style:
            return part
        if self.laid_out is not None:
            # Some models lay their cosines out in one style and turn in the other.
            part = part.chunk(2, dim=-1)[0] if self.laid_out == "half" else part[..., ::2]
        return _SPREAD[self.style](part)


def layout_of(part: Tensor, pairs: int) -> str | None:
    """How sines ``[.., n]`` that differ by pair are laid out: in one of the styles, or ``None`` where there is one of each pair.

    Raises:
        ValueError: It is neither.
    """
    if part.shape[-1] == pairs:
        return None
    if part.shape[-1] == 2 * pairs:
        if torch.equal(part[..., :pairs], part[..., pairs:]):
            return "half"
        if torch.equal(part[..., ::2], part[..., 1::2]):
            return "interleaved"
    raise ValueError(f"{part.shape[-1]} sines are no layout of {pairs} pairs")


_SPREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda part: torch.cat([part, part], dim=-1),
    "interleaved": lambda part: part.repeat_interleave(2, dim=-1),
}
STYLES = tuple(_SPREAD)
