"""Other updates of the thought state, at the same state size, tried against ``S <- Norm(S + gain enc(K_e, V_e))``.

An evicted token has scores ``c = (W_Q h_g) (W_K K_e)^T / sqrt(R)`` (``[B, E, Q]``) and values ``v = W_V V_e`` (``[B, E, R]``);
the paper's update adds the mean of their outer products. ``S0`` is the paper's everywhere.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_pte import PTEConfig
from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.layer import PTELinear
from peft_pte.method.state import Evicted


def normalize_rows(state: Tensor) -> Tensor:
    """Rows of L2 norm 1; a zero row stays zero."""
    square = state.square().sum(dim=-1, keepdim=True)
    # Masked before the root: its slope at zero is infinite, and a row may be exactly zero.
    return state / torch.where(square > 0, square, 1.0).sqrt()


class VariantEncoder(PTEEncoder):
    """An encoder whose updates are those of :meth:`update`; its start is the paper's."""

    by_key = False
    """Whether adapters find tokens by their scores (``state_address="key"``) or by their values."""
    normalized_reading = False
    """Whether adapters read the state through the norm of its rows."""

    def prepare(self, rank: int, queries: int) -> None:
        """Make the parameters of the variant."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        """The state ``[B, Q, R]`` after tokens with ``scores [B, E, Q]`` and ``values [B, E, R]`` left.

        ``tokens [B, E, 2 R]`` are the projected keys and values, for gates.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `update`.")

    def read(self, rows: Tensor) -> Tensor:
        """Keys or values ``[B, E, D]`` as the projections see them."""
        return rows

    def forward(self, adapter_name: str, state: Tensor, evicted: Evicted, times: int = 1) -> Tensor:
        """As in :class:`PTEEncoder`; one eviction after the other."""
        settings = self.settings[adapter_name]
        if settings.state_update != "progressive":
            return super().forward(adapter_name, state, evicted, times)
        if evicted.valid is not None:
            raise NotImplementedError("`variants` take traces without padding, got a mask. Leave the mask out.")
        keys, values, (rotation, _) = evicted.keys, evicted.values, self.applied_rotations(adapter_name)
        if rotation is not None:
            keys = rotation.remove(keys, evicted.positions)
        query, key_projection, value_projection = self.projections(adapter_name)
        rows = (self.read(heads.to(state.dtype).transpose(1, 2).flatten(start_dim=2)) for heads in (keys, values))
        projected, told = map(functional.linear, rows, (key_projection, value_projection))
        scores = functional.linear(projected, query) / math.sqrt(query.shape[-1])
        tokens = torch.cat([projected, told], dim=-1)
        states = []
        for eviction in zip(*(part.chunk(times, dim=1) for part in (scores, told, tokens)), strict=True):
            state = self.update(state, *eviction, settings.gain)
            states.append(state)
        return torch.stack(states, dim=1)


class NormalizedReading(PTELinear):
    """A linear whose adapters read ``Norm(S)``."""

    def _told(self, state: Tensor, adapter: str) -> Tensor:
        state = super()._told(state, adapter)
        return normalize_rows(state.mT).mT if self.by_key[adapter] else normalize_rows(state)


def mean_product(scores: Tensor, values: Tensor) -> Tensor:
    """``S' [B, Q, R]``, the paper's update."""
    return scores.mT @ values / scores.shape[1]


class Unit(VariantEncoder):
    """The paper's update of keys and values of mean square 1: its size no longer depends on the base model's."""

    def read(self, rows: Tensor) -> Tensor:
        return functional.rms_norm(rows, rows.shape[-1:])

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(state + gain * mean_product(scores, values))


class RowGain(VariantEncoder):
    """A learned gain per row, from 0.1 to 2 at the start: rows of different time scales."""

    def prepare(self, rank: int, queries: int) -> None:
        self.row_gain = nn.Parameter(torch.linspace(math.log(0.1), math.log(2.0), queries))

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(state + self.row_gain.exp()[:, None] * mean_product(scores, values))


class Gate(VariantEncoder):
    """A learned gate per evicted token on the paper's update: what is not worth keeping is not written."""

    def prepare(self, rank: int, queries: int) -> None:
        self.gate = nn.Linear(2 * rank, 1)

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(state + gain * mean_product(2.0 * self.gate(tokens).sigmoid() * scores, values))


class Frobenius(VariantEncoder):
    """One norm for all rows: the mean square of the rows' norms is 1."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        added = state + gain * mean_product(scores, values)
        return added / (added.square().sum(dim=(-2, -1), keepdim=True) / added.shape[1]).clamp(min=1e-12).sqrt()


class Ball(VariantEncoder):
    """Rows are shortened to norm 1 only if they are longer: an empty state forgets nothing."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        added = state + gain * mean_product(scores, values)
        return added / added.square().sum(dim=-1, keepdim=True).clamp(min=1.0).sqrt()


class Sum(VariantEncoder):
    """No normalisation after ``S0``: nothing is ever forgotten."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return state + gain * mean_product(scores, values)


class Cumulative(Sum):
    """The plain sum, which forgets nothing, read through the norm of its rows: all evictions weigh the same."""

    normalized_reading = True


class CumulativeSoftmax(Cumulative):
    """The same, of a softmax over the tokens of an eviction."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return state + gain * (scores.softmax(dim=1).mT @ values)


class SlotsForget(VariantEncoder):
    """Writing by address (``encoder_attention="slots"``), where a row also forgets as much as is written to it."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return self.write(state, scores.softmax(dim=-1), values, gain)

    def write(self, state: Tensor, shares: Tensor, values: Tensor, gain: float) -> Tensor:
        """``shares [B, E, Q]``, what each row gets of each token, summed rather than averaged."""
        kept = (1.0 - shares).prod(dim=1)
        return normalize_rows(kept[..., None] * state + gain * shares.mT @ values)


class SlotsGate(SlotsForget):
    """The same, with a learned gate per token and a learned sharpness."""

    def prepare(self, rank: int, queries: int) -> None:
        self.gate = nn.Linear(2 * rank, 1)
        self.sharpness = nn.Parameter(torch.tensor(math.log(4.0)))

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        shares = self.gate(tokens).sigmoid() * (self.sharpness.exp() * scores).softmax(dim=-1)
        return self.write(state, shares, values, gain)


class Decay(VariantEncoder):
    """A learned decay per row (0.88 to 0.993 an eviction at the start) in place of the normalisation."""

    def prepare(self, rank: int, queries: int) -> None:
        self.decay = nn.Parameter(torch.linspace(2.0, 5.0, queries))

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return self.decay.sigmoid()[:, None] * state + gain * mean_product(scores, values)


class Delta(VariantEncoder):
    """The delta rule, token by token in order: what an address held is replaced, other addresses are left alone.

    With ``M`` the state as adapters read it, a unit address ``a``, the content ``c`` and a learned gate ``b`` in (0, 1):
    ``M <- M + b (c - M a) a^T``, for all ``E`` tokens at once: the corrections ``U`` solve
    ``(I + tril(b A A^T, -1)) U = b (C - A M^T)``, then ``M <- M + U^T A``.
    """

    def prepare(self, rank: int, queries: int) -> None:
        self.gate = nn.Linear(2 * rank, 1)
        nn.init.constant_(self.gate.bias, -1.0)

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        memory, address, content = (state.mT, scores, values) if self.by_key else (state, values, scores)
        gate = self.gate(tokens).sigmoid()
        unit = functional.normalize(address, dim=-1, eps=1e-6)
        overlap = (gate * (unit @ unit.mT)).tril(-1) + torch.eye(unit.shape[1], device=unit.device)
        wanted = gate * (gain * content - unit @ memory.mT)
        corrections = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
        memory = memory + corrections.mT @ unit
        return memory.mT if self.by_key else memory


class DeltaNorm(Delta):
    """The delta rule, then rows of norm 1."""

    def update(self, state: Tensor, scores: Tensor, values: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(super().update(state, scores, values, tokens, gain))


VARIANTS: dict[str, type[VariantEncoder]] = {
    "unit": Unit,
    "row-gain": RowGain,
    "gate": Gate,
    "frobenius": Frobenius,
    "ball": Ball,
    "sum": Sum,
    "cumulative": Cumulative,
    "cumulative-softmax": CumulativeSoftmax,
    "slots-forget": SlotsForget,
    "slots-gate": SlotsGate,
    "decay": Decay,
    "delta": Delta,
    "delta-norm": DeltaNorm,
}


def install(model: nn.Module, name: str, config: PTEConfig) -> None:
    """Give every encoder of ``model`` the update ``name``, and the parameters that it needs.

    Raises:
        ValueError: ``name`` is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {name!r}.")
    for module in list(model.modules()):
        if isinstance(module, PTEEncoder):
            settings = next(iter(module.settings.values()))
            module.__class__ = VARIANTS[name]
            assert isinstance(module, VariantEncoder)
            module.by_key = config.state_address == "key"
            module.prepare(settings.rank, settings.num_queries)
            module.to(module.beside.device)
    if VARIANTS[name].normalized_reading:
        for module in model.modules():
            if isinstance(module, PTELinear):
                module.__class__ = NormalizedReading


class FollowingEncoder(PTEEncoder):
    """An encoder whose states are those of another, which runs before it in every chunk."""

    def follow(self, leader: PTEEncoder) -> None:
        """Take the states of ``leader`` from now on."""
        # In a tuple, so that it does not become a submodule of this one.
        self._leader = (leader,)
        self._waiting: deque[Tensor] = deque()
        leader.register_forward_hook(lambda module, args, states: self._waiting.append(states))

    def initial_state(self, adapter_name: str) -> Tensor:
        """``S0 [Q, R]`` of the leader."""
        start: Tensor = self._leader[0].initial_state(adapter_name)
        return start

    def forward(self, adapter_name: str, state: Tensor, evicted: Evicted, times: int = 1) -> Tensor:
        """What the leader's states were after the evictions of the same chunk."""
        return self._waiting.popleft()


def share_state(model: nn.Module, layer_index: int) -> None:
    """Let the adapters of all layers read the states of the first layer; the other encoders are out of use.

    Layers must not be run again out of order (gradient checkpointing).

    Raises:
        ValueError: ``layer_index`` is not 0: a layer takes all its tokens before the next, so that no later one has states in time.
    """
    if layer_index != 0:
        raise ValueError(f"`shared_layer` must be 0, the layer that runs before all others, got {layer_index}.")
    leader, *others = (module for module in model.modules() if isinstance(module, PTEEncoder))
    for encoder in others:
        encoder.__class__ = FollowingEncoder
        assert isinstance(encoder, FollowingEncoder)
        encoder.follow(leader)
