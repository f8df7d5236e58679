"""`PTELinear`: a linear layer that reads the thought state, ``y = W x + scale * A (S^T (B x))``, or ``S`` by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import PTEConfig
from ..ops import delta, for_tokens, resolve_impl
from ..ops.delta import TokenOps
from ..shapes import whole_shape
from .state import Reading, bound, read_state

MERGE_REFUSED = (
    "A PTE adapter cannot be merged: its weight `dW = A S B` is different for every sequence and changes while the "
    "sequence is decoded, so no single weight equals it. Keep the adapter beside the model and decode with "
    "`model.generate`. (TRL merges to feed vLLM: train with use_vllm=False.)"
)
_LORA_ARGUMENTS = {
    "adapter_names": "a PTE cache holds the states of one adapter, so rows cannot have different ones. Use one adapter per "
    "call: model.set_adapter(name), or model.disable_adapter() for the rows of the base model.",
    "alora_offsets": "activated LoRA is another method, and a PTE adapter acts from the first token on. Leave it out.",
}


def refuse_lora_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what peft hands to LoRA's layers beside a call.

    Raises:
        NotImplementedError: One of them is there and is not ``None``.
    """
    for name, reason in _LORA_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None:
            raise NotImplementedError(f"`{name}` must be None with a PTE adapter, got {value!r}: {reason}")


def without_lora_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of an adapted model: refuse LoRA's arguments, and take those away that are ``None``."""
    # At every token: no function of ours, and none that a tracer does not know.
    for name in _LORA_ARGUMENTS:
        if name in kwargs:
            break
    else:
        return None
    refuse_lora_arguments(kwargs)
    return args, {name: value for name, value in kwargs.items() if name not in _LORA_ARGUMENTS}


class PTELayer(BaseTunerLayer):
    """What adapted linears and encoders have in common."""

    # Where `peft.helpers.disable_input_dtype_casting` keeps its switch.
    cast_input_dtype_enabled: bool = True

    if TYPE_CHECKING:
        # peft's, which the type checker takes for entries of `nn.Module` otherwise.
        def get_base_layer(self) -> nn.Module: ...  # noqa: D102
        @property
        def active_adapters(self) -> list[str]: ...  # noqa: D102
        def _move_adapter_to_device_of_base_layer(
            self, adapter_name: str, device: torch.device | None = None
        ) -> None: ...
        def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ValueError: More than one adapter is named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"At most one PTE adapter can be active, got {names}: each reads a thought state of its own, and a cache "
                "holds one. Activate them one at a time."
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def current_adapter(self) -> str | None:
        """The adapter in use, or ``None`` while adapters are disabled or this layer lacks the active one."""
        if self._disable_adapters:
            return None
        for name in self.active_adapters:
            if self.holds(name):
                return name
        return None

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has the adapter; asked once per layer and token, so no set is built to answer."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a dynamic weight has no merged form."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refuse: nothing can have been merged."""
        raise NotImplementedError(MERGE_REFUSED)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Refuse: there is one per sequence and moment."""
        raise NotImplementedError(MERGE_REFUSED)


class PTELinear(nn.Module, PTELayer):
    """An ``nn.Linear`` or ``Conv1D`` with PTE adapters."""

    adapter_layer_names = ("pte_down", "pte_up")
    other_param_names = ("r", "scale", "initial_scale", "dropout", "impl", "by_key")

    def __init__(self, base_layer: nn.Module, layer_index: int, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_index = layer_index
        self.name = name
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.scale: dict[str, float] = {}
        self.initial_scale: dict[str, float] = {}
        self.impl: dict[str, str] = {}
        self.by_key: dict[str, bool] = {}
        self.dropout = nn.ModuleDict()
        self.pte_down: Any = nn.ModuleDict()
        self.pte_up: Any = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: PTEConfig, rank: int, alpha: float | None) -> None:
        """Add (or replace) the adapter ``adapter_name`` of ``rank``; ``alpha`` overrides the config's."""
        self.r[adapter_name] = rank
        self.scale[adapter_name] = self.initial_scale[adapter_name] = config.scale(rank, alpha)
        self.impl[adapter_name] = config.impl
        self.dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.by_key[adapter_name] = config.state_address == "key"
        asked, told = (config.num_queries, rank) if self.by_key[adapter_name] else (rank, config.num_queries)
        self.pte_down[adapter_name] = nn.Linear(self.in_features, asked, bias=False)
        self.pte_up[adapter_name] = nn.Linear(told, self.out_features, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has the adapter."""
        return adapter_name in self.r

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let ``adapter`` act with ``scale`` times the scale of its config, as LoRA's layers do; it is not saved."""
        if adapter in self.scale:
            self.scale[adapter] = scale * self.initial_scale[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapter."""
        for adapter in self.active_adapters:
            if adapter in self.scale:
                self.scale[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapter; ``None``: back to that of its config."""
        for adapter in self.active_adapters:
            if adapter in self.scale:
                self.scale[adapter] = self.initial_scale[adapter] if scale is None else self.scale[adapter] / scale

    def reset_parameters(self, adapter_name: str, identity: bool) -> None:
        """Kaiming-uniform ``pte_down``; zeros in ``pte_up`` where ``identity``, Kaiming-uniform too where not."""
        nn.init.kaiming_uniform_(weight_of(self.pte_down[adapter_name]), a=math.sqrt(5))
        if identity:
            nn.init.zeros_(weight_of(self.pte_up[adapter_name]))
        else:
            nn.init.kaiming_uniform_(weight_of(self.pte_up[adapter_name]), a=math.sqrt(5))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, T, in] -> [B, T, out]``; the base layer alone while no adapter is in use."""
        result = self.base_layer(x, *args, **kwargs)
        reading: Reading | None = getattr(bound, "reading", None)
        if self._disable_adapters or (reading is None and self.current_adapter() is None):
            return result
        if reading is None:
            reading = read_state()
        # That of the pass: a checkpoint may run this again after another adapter was made the active one.
        adapter = reading.adapter
        if adapter not in self.r:
            return result
        if (
            reading.read is not None
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and self.cast_input_dtype_enabled
            and not (self.training and isinstance(self.dropout._modules[adapter], nn.Dropout))
        ):
            # One token per row. All in one function: it runs for every linear and token.
            read = reading.ahead.pop(self.name, None) if reading.input is x else None
            if read is None and x.ndim == 3 and x.shape[0] == reading.rows and x.shape[1] == 1:
                stacked = reading.downs.get(self.name)
                down: Tensor = self.pte_down._modules[adapter].weight if stacked is None else stacked.down
                kind = down.dtype, self.by_key[adapter], self.r[adapter]
                state, reading.operations = reading.read.get(kind) or self._prepared(reading, kind)
                # One product down for all that read `x`: what the others take is left for them.
                read, *others = reading.operations.read(x, down, state)
                reading.input = x
                reading.ahead = {} if stacked is None else dict(zip(stacked.names[1:], others, strict=True))
            operations = reading.operations
            if read is not None and operations is not None and isinstance(result, Tensor) and result.is_contiguous():
                rows, up = result.view(reading.rows, -1), self.pte_up._modules[adapter].weight.t()
                if up.dtype != rows.dtype and not operations.mixes:
                    read, up = read.to(rows.dtype), up.to(rows.dtype)
                # Onto what the linear has just made.
                operations.add_(rows, read, up, alpha=self.scale[adapter])
                return result
        if not isinstance(result, Tensor):
            raise NotImplementedError(
                f"`{self.name}` ({type(self.get_base_layer()).__name__}) returns more than one tensor, so it is no linear "
                f"layer to adapt. Leave it out with exclude_modules=[{self.name.rpartition('.')[2]!r}]."
            )
        x, state = self._by_sequence(x, adapter)
        down, up = weight_of(self.pte_down[adapter]), weight_of(self.pte_up[adapter])
        hidden = self._input(x, adapter, down.dtype)
        rows = result.reshape(*hidden.shape[:2], -1)
        scale, impl = self.scale[adapter], self.impl[adapter]
        return delta(hidden, down, state, up, scale=scale, onto=rows, impl=impl).reshape(result.shape)

    def _prepared(self, reading: Reading, kind: tuple[torch.dtype, bool, int]) -> tuple[Tensor, TokenOps]:
        """What linears of this ``kind`` read at one token per row, and how; kept for as long as the state is what it is."""
        adapter, dtype, device = reading.adapter, kind[0], reading.state.device
        operations = for_tokens(self.impl[adapter], device, dtype, reading.rows)
        found = self._told(reading.state, adapter).to(dtype), operations
        if reading.read is not None:
            reading.read[kind] = found
        return found

    def _told(self, state: Tensor, adapter: str) -> Tensor:
        """What this linear reads of ``S [.., Q, R]``: ``[.., Q, R]``, or ``[.., R, Q]`` by key."""
        state = state[..., : self.r[adapter]]
        return state.mT if self.by_key[adapter] else state

    def _input(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        """What the adapter reads. Without dropout ``x`` itself: `delta` casts it, and keeps it as it came."""
        dropout = self.dropout[adapter]
        if self.training and isinstance(dropout, nn.Dropout):
            return cast(Tensor, dropout(self._cast_input_dtype(x, dtype)))
        if not self.cast_input_dtype_enabled and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                f"`{self.name}` must get the dtype of its adapter, {dtype}, while casting is off, got {x.dtype}. Leave out "
                "peft's disable_input_dtype_casting."
            )
        return x

    def _by_sequence(self, x: Tensor, adapter: str) -> tuple[Tensor, Tensor]:
        """The input as ``[B * N, T / N, in]`` and the states that its rows read: ``[.., Q, R]``, or ``[.., R, Q]`` by key."""
        reading = read_state()
        state, rows, tokens = reading.state, reading.rows, reading.tokens
        # Some MLPs flatten the batch; a routed expert gets tokens in an order of its own, even if it gets them all.
        flat = x.ndim == 2 and x.shape[0] == rows * tokens and ".experts." not in self.name
        if not flat and (x.ndim != 3 or x.shape[0] != rows):
            raise ValueError(
                f"`{self.name}` got an input of shape {tuple(x.shape)} for {rows} sequences of {tokens} tokens: its rows "
                "cannot be told apart by sequence, so it cannot read their states. Leave it out with exclude_modules="
                f"[{self.name.rpartition('.')[2]!r}]."
            )
        states = state.shape[0]
        if flat or states != rows:
            x = x.reshape(states, rows * tokens // states, -1)
        return x, self._told(state, adapter)

    def resolved_impl(self, adapter_name: str) -> str:
        """Who computes this layer's adapter where it stands, at one token of one row: ``"reference"`` or ``"triton"``."""
        weight = weight_of(self.pte_down[adapter_name])
        return resolve_impl(self.impl[adapter_name], weight.device, "delta_token", weight.dtype, rows=1)

    def __repr__(self) -> str:
        return "pte." + super().__repr__()


def is_linear(module: nn.Module) -> bool:
    """Whether a PTE adapter can sit on ``module``."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_features(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear layer.

    Raises:
        TypeError: ``module`` is no linear layer that can be adapted.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        inner, outer = whole_shape(module.weight)
        return inner, outer
    raise TypeError(
        f"`target_modules` must name nn.Linear or transformers' Conv1D layers, got {type(module).__name__}. Leave it out "
        "with `exclude_modules`."
    )


def weight_of(module: nn.Module) -> Tensor:
    """The parameter of a module that has one."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # For the type checker: nn.Module says Tensor or Module.
    return weight


def float_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype states are kept in beside ``parameter``: float64 for float64, float32 for all else."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
