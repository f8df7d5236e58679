"""Keys without their rotary rotation, by the model's own rotary code.

A rotation by ``theta`` is undone by the same code with ``sin`` negated; cosines and sines that carry an attention
scaling ``a`` (YaRN) are divided by ``a ** 2``, since ``a R(-theta) / a**2`` undoes ``a R(theta)``. Whether that holds
for a model is not assumed but tried once, on the attention layer itself (:func:`find_rotation`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.compress import ROTARY_STYLES, rotate

# One token, at these positions, tells a rotation from none and a right inverse from a wrong one.
_PROBE_POSITIONS = (0, 7)
_REMEDY = '`key_rotation` must be "kept" for this model, got "removed": {reason} Use PTEConfig(key_rotation="kept").'


@dataclass(frozen=True)
class Rotation:
    """The rotary code of one attention layer."""

    embedding: nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, T, rotary_dim]`` at ``positions [N, T]``."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        if self.layer_type is not None:
            cos, sin = self.embedding(like, positions, self.layer_type)
        else:
            cos, sin = self.embedding(like, positions)
        return cos, sin

    def remove(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys as they were before the rotation.

        Args:
            keys: ``[B, G, E, head_dim]``, rotated, in float32 or float64.
            positions: ``[B, 1 or G, E]``, where each key stood.

        Returns:
            ``[B, G, E, head_dim]``.
        """
        batch, heads, evicted, head_dim = keys.shape
        groups = positions.shape[1]
        cos, sin = self.inverse_cos_sin(positions.reshape(batch * groups, evicted), keys.dtype)
        rows = keys.reshape(batch * groups, heads // groups, evicted, head_dim)
        # Where only the first dimensions are rotated, some models split them off before their rotary code and some in it.
        rotated, unrotated = rows[..., : cos.shape[-1]], rows[..., cos.shape[-1] :]
        _, plain = self.apply(rotated, rotated, cos, sin)
        return torch.cat([plain, unrotated], dim=-1).reshape(keys.shape)

    def inverse_cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, T, rotary_dim]`` that undo the rotation at ``positions [N, T]``."""
        cos, sin = self.cos_sin(positions, dtype)
        square = self._scaling() ** 2
        return cos / square, -sin / square

    @functools.cached_property
    def style(self) -> str | None:
        """Which dimensions turn together: ``"half"``, ``"interleaved"``, or ``None`` where it is neither (tried out)."""
        device = next((buffer.device for buffer in self.embedding.buffers()), torch.device("cpu"))
        cos, sin = self.cos_sin(torch.tensor([[5]], device=device), torch.float32)
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, 1, 1, cos.shape[-1], generator=generator).to(device)
        _, turned = self.apply(row, row, cos, sin)
        for style in ROTARY_STYLES:
            pairs = (
                (cos.chunk(2, dim=-1), sin.chunk(2, dim=-1))
                if style == "half"
                else ((cos[..., ::2], cos[..., 1::2]), (sin[..., ::2], sin[..., 1::2]))
            )
            equal = all(torch.equal(*pair) for pair in pairs)
            if equal and torch.allclose(rotate(row, cos, sin, style), turned, atol=1e-5):
                return style
        return None

    def _scaling(self) -> float:
        name = "attention_scaling" if self.layer_type is None else f"{self.layer_type}_attention_scaling"
        return float(getattr(self.embedding, name, 1.0))


class _CapturedError(Exception):
    """Ends a probe as soon as the layer hands its keys to the cache."""


class _ProbeCache:
    """Stands where a cache stands, and keeps the first keys and values it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise _CapturedError


def has_numbers(module: nn.Module) -> bool:
    """Whether the weights of ``module`` are here (not on the meta device, not sharded away)."""
    weight = next(module.parameters())
    return weight.device.type != "meta" and weight.numel() > 0


def find_rotation(attention: nn.Module, backbone: nn.Module, layer_type: str | None) -> Rotation | None:
    """The rotation this layer applies to its keys, or ``None`` if it applies none.

    The layer runs on one random token at two positions. Equal keys mean that it does not rotate them; keys that become
    equal when un-rotated mean that its rotation was found. Where the weights hold no numbers yet (meta device), the
    rotation is taken from the structure of the model alone.

    Raises:
        NotImplementedError: The layer rotates its keys and the rotation cannot be found or undone; the message names
            the config field that avoids the need.
    """
    rotation = _structural_rotation(attention, backbone, layer_type)
    if not has_numbers(attention):
        return rotation
    if rotation is None:
        if _uses_rotary(backbone):
            raise NotImplementedError(
                _REMEDY.format(
                    reason=f"{type(attention).__name__} rotates its keys by code that is not where transformers puts it "
                    "(`rotary_emb` on the backbone, `apply_rotary_pos_emb` beside the attention class)."
                )
            )
        return None
    try:
        probes = [probe(attention, backbone, rotation, position).keys for position in _PROBE_POSITIONS]
        if _close(*probes):
            return None
        plain = [
            rotation.remove(keys, torch.tensor([[[position]]], device=keys.device))
            for keys, position in zip(probes, _PROBE_POSITIONS, strict=True)
        ]
    except (TypeError, RuntimeError, AttributeError) as error:
        raise NotImplementedError(
            _REMEDY.format(reason=f"the rotary code of {type(attention).__name__} cannot be tried alone ({error}).")
        ) from error
    if not _close(*plain):
        raise NotImplementedError(
            _REMEDY.format(reason=f"undoing the rotation of {type(attention).__name__} did not give its keys back.")
        )
    return rotation


def probe(attention: nn.Module, backbone: nn.Module, rotation: Rotation | None, position: int) -> _ProbeCache:
    """What one random token at ``position`` leaves in the cache, in float32 or float64.

    Raises:
        TypeError: The layer cannot be called with the arguments that transformers' layers take.
        RuntimeError: The layer does not hand its keys to the cache, or fails.
    """
    weight = next(parameter for parameter in attention.parameters() if parameter.ndim == 2)
    config: Any = getattr(attention, "config", backbone.config)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, config.hidden_size, generator=generator).to(weight.device)
    hidden = hidden.to(weight.dtype) if weight.is_floating_point() else hidden
    positions = torch.tensor([[position]], device=weight.device)
    accepted = inspect.signature(attention.forward).parameters
    arguments: dict[str, Any] = {"attention_mask": None}
    if rotation is not None:
        arguments["position_embeddings"] = rotation.cos_sin(positions, hidden.dtype)
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    cache = _ProbeCache()
    # The argument that takes the cache is the one thing architectures do not agree on.
    arguments["layer_past" if "layer_past" in accepted else "past_key_values"] = cache
    try:
        with torch.no_grad():
            attention(hidden_states=hidden, **arguments)
    except _CapturedError:
        wide = torch.float64 if cache.keys.dtype == torch.float64 else torch.float32
        cache.keys, cache.values = cache.keys.to(wide), cache.values.to(wide)
        return cache
    raise RuntimeError(f"{type(attention).__name__} does not hand its keys to the cache it is given")


def _structural_rotation(attention: nn.Module, backbone: nn.Module, layer_type: str | None) -> Rotation | None:
    embedding = getattr(backbone, "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None:
        return None
    per_type = "layer_type" in inspect.signature(embedding.forward).parameters
    return Rotation(embedding, apply, layer_type if per_type else None)


def _uses_rotary(backbone: nn.Module) -> bool:
    config: Any = backbone.config
    names = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_emb_base")
    return any(getattr(config, name, None) is not None for name in names) or getattr(config, "rotary", False)


def _close(left: Tensor, right: Tensor) -> bool:
    # Half-precision keys agree to about 1 %; a wrong rotation is off by its own size.
    return bool((left - right).norm() <= 0.05 * left.norm())
