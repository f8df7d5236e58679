"""`PTEEncoder`: the cross-attention that turns what a layer evicts into its thought state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BuiltAdapter, PTEConfig
from ..ops import encode
from ..shapes import InitialState, checked
from .layer import PTELayer, float_dtype, weight_of
from .rotary import Rotation
from .state import Evicted

CHILD_NAME = "thought_encoder"
"""Where an encoder hangs on its attention layer; the name does not appear in checkpoints."""


class GlobalTokens(nn.Module):
    """Learned tokens ``h_g [Q, D]``."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))


@dataclass(frozen=True)
class EncoderSettings:
    """What an adapter's config says to its encoders."""

    rank: int
    num_queries: int
    empty_start: bool
    state_update: str
    attention: str
    gain: float
    rotation_removed: bool
    impl: str


class PTEEncoder(nn.Module, PTELayer):
    """One layer's encoder: ``S0 = Norm(enc(h_g, h_g))``, then ``S <- Norm(S + gain * enc(K_e, V_e))``.

    A child of the attention layer it reads.

    Args:
        attention: The layer.
        widths: ``D_k`` and ``D_v``, of what it caches as keys and as values; global tokens have the wider one, ``D``.
        rotations: How it turns keys and values; ``None``: not at all.
    """

    adapter_layer_names = ("pte_global_tokens", "pte_query", "pte_key", "pte_value")
    other_param_names = ("settings", "built")
    # peft asks tuner layers for weight and bias of the layer they wrap; an encoder wraps none.
    weight = None
    bias = None

    def __init__(
        self, attention: nn.Module, widths: tuple[int, int], rotations: tuple[Rotation | None, Rotation | None]
    ) -> None:
        super().__init__()
        self.key_width, self.value_width = widths
        # In a tuple, so that neither becomes a submodule of this one.
        self._outside = (attention, rotations)
        self.settings: dict[str, EncoderSettings] = {}
        # Kept so that an adapter's config knows it for as long as the encoder has the adapter.
        self.built: dict[str, BuiltAdapter] = {}
        self.pte_global_tokens = nn.ModuleDict()
        self.pte_query = nn.ModuleDict()
        self.pte_key = nn.ModuleDict()
        self.pte_value = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    @property
    def width(self) -> int:
        """``D``, of global tokens."""
        return max(self.key_width, self.value_width)

    @property
    def beside(self) -> Tensor:
        """A weight of the attention layer beside this encoder: it tells where the encoder belongs."""
        return next(self._outside[0].parameters())

    def _get_available_adapters(self) -> set[str]:
        return set(self.settings)

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has the adapter."""
        return adapter_name in self.settings

    def update_layer(self, adapter_name: str, config: PTEConfig, rank: int, evicts: bool = True) -> None:
        """Add (or replace) the encoder of ``adapter_name`` with states of ``rank`` columns.

        A layer that never ``evicts`` has no state to learn: its adapters read the identity, plain low rank.
        """
        state_update = config.state_update if evicts else "off"
        self.settings[adapter_name] = EncoderSettings(
            rank=rank,
            num_queries=config.num_queries,
            empty_start=config.num_global_tokens == 0,
            state_update=state_update,
            attention=config.encoder_attention,
            gain=config.update_gain,
            rotation_removed=config.key_rotation == "removed",
            impl=config.impl,
        )
        if state_update == "off":
            return
        self.pte_global_tokens[adapter_name] = GlobalTokens(config.num_queries, self.width)
        for projection, width in (
            (self.pte_query, self.width),
            (self.pte_key, self.key_width),
            (self.pte_value, self.value_width),
        ):
            projection[adapter_name] = nn.Linear(width, rank, bias=False)
        self.reset_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def reset_parameters(self, adapter_name: str) -> None:
        """Unit-variance global tokens, Kaiming-uniform projections."""
        nn.init.normal_(weight_of(self.pte_global_tokens[adapter_name]))
        for projection in (self.pte_query, self.pte_key, self.pte_value):
            nn.init.kaiming_uniform_(weight_of(projection[adapter_name]), a=math.sqrt(5))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.pte_query:
            return
        beside = self.beside
        dtype = beside.dtype if beside.is_floating_point() else None
        for name in self.adapter_layer_names:
            module = getattr(self, name)[adapter_name]
            if not any(parameter.device.type == "meta" for parameter in module.parameters()):
                module.to(device=device or beside.device, dtype=dtype)

    @checked
    def initial_state(self, adapter_name: str) -> InitialState:
        """``S0 [Q, R]``: what every sequence starts with (paper section 3.2; the identity for ``"off"``).

        Raises:
            RuntimeError: DeepSpeed holds a part of the weights, and has not fetched the rest.
        """
        settings = self.settings[adapter_name]
        if settings.state_update == "off":
            weight = self.beside
            return torch.eye(settings.num_queries, settings.rank, dtype=float_dtype(weight), device=weight.device)
        tokens = weight_of(self.pte_global_tokens[adapter_name])
        if tokens.ndim < 2:
            # What DeepSpeed leaves in place of a weight.
            raise RuntimeError(
                f"The weights of adapter {adapter_name!r} are partitioned (ZeRO-3), and DeepSpeed fetches them for a forward pass "
                "of its engine alone. Keep TRL's ds3_gather_for_generation=True, or generate within "
                "deepspeed.zero.GatheredParameters(model.parameters())."
            )
        empty = tokens.new_zeros(1, settings.num_queries, settings.rank, dtype=float_dtype(tokens))
        keys, values = tokens[..., : self.key_width], tokens[..., : self.value_width]
        start = self._encode(adapter_name, empty, keys[None, None], values[None, None], None)[0, 0]
        # Times zero rather than zeros, so that DDP finds every weight in the graph of a call without an eviction.
        return start * 0.0 if settings.empty_start else start

    def forward(self, adapter_name: str, state: Tensor, evicted: Evicted, times: int = 1) -> Tensor:
        """``[B, N, Q, R]``: what ``S [B, Q, R]`` is after each of ``N = times`` evictions; itself where it is not updated."""
        settings = self.settings[adapter_name]
        if settings.state_update != "progressive":
            return state[:, None].expand(-1, times, -1, -1)
        keys, values = evicted.keys.to(state.dtype), evicted.values.to(state.dtype)
        widths = tuple(part.shape[1] * part.shape[3] for part in (keys, values))
        if widths != (self.key_width, self.value_width):
            raise NotImplementedError(
                f"{type(self._outside[0]).__name__} caches keys {tuple(keys.shape)} and values {tuple(values.shape)} where widths of "
                f"{self.key_width} and {self.value_width} were found. Load the weights of the base model before the adapter is added."
            )
        positions = evicted.positions.to(keys.device)
        of_keys, of_values = self.applied_rotations(adapter_name)
        keys = keys if of_keys is None else of_keys.remove(keys, positions)
        values = values if of_values is None else of_values.remove(values, positions)
        valid = None
        if evicted.valid is not None:
            # Positions and validity are kept beside the inputs; a model may be spread over devices.
            mask = evicted.valid.to(keys.device)
            keys, values = torch.where(mask[..., None], keys, 0.0), torch.where(mask[..., None], values, 0.0)
            valid = mask.any(dim=1)
        return self._encode(adapter_name, state, _rows(keys, times), _rows(values, times), _split(valid, times))

    def forward_rows(self, adapter_name: str, state: Tensor, evicted: Evicted, rows: Tensor | None) -> Tensor:
        """``[B, Q, R]``: what ``S [B, Q, R]`` is after one eviction of ``rows [B']`` (``None``: of all)."""
        if rows is None or self.settings[adapter_name].state_update != "progressive":
            return state if rows is not None else self(adapter_name, state, evicted)[:, -1]
        there = rows.to(state.device)
        after = self(adapter_name, state.index_select(0, there), evicted)[:, -1]
        return state.index_copy(0, there, after)

    def applied_rotations(self, adapter_name: str) -> tuple[Rotation | None, Rotation | None]:
        """The rotations that are undone before keys and values are read; ``None`` where they are read as cached."""
        of_keys, of_values = self._outside[1]
        return (of_keys, of_values) if self.settings[adapter_name].rotation_removed else (None, None)

    def projections(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """``W_Q h_g [Q, R]``, ``W_K [R, D_k]`` and ``W_V [R, D_v]``."""
        tokens = weight_of(self.pte_global_tokens[adapter_name])
        key, value = weight_of(self.pte_key[adapter_name]), weight_of(self.pte_value[adapter_name])
        wide = float_dtype(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            query = nn.functional.linear(tokens.to(wide), weight_of(self.pte_query[adapter_name]).to(wide))
        return query, key, value

    def _encode(self, adapter_name: str, state: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        settings = self.settings[adapter_name]
        query, key_projection, value_projection = self.projections(adapter_name)
        if self.key_width != self.value_width:
            # Operands of one width: zeros add nothing.
            keys, values, key_projection, value_projection = (
                nn.functional.pad(part, (0, self.width - part.shape[-1]))
                for part in (keys, values, key_projection, value_projection)
            )
        return encode(
            state,
            query,
            keys,
            values,
            key_projection,
            value_projection,
            valid,
            gain=settings.gain,
            attention=settings.attention,
            impl=settings.impl,
        )


def _rows(heads: Tensor, times: int) -> Tensor:
    """``[B, G, N E, head_dim] -> [B, N, E, D]``."""
    return heads.transpose(1, 2).flatten(start_dim=2).unflatten(1, (times, -1))


def _split(valid: Tensor | None, times: int) -> Tensor | None:
    """``[B, N E] -> [B, N, E]``."""
    return None if valid is None else valid.unflatten(1, (times, -1))
