"""Other updates of the thought state, at the same state size, tried against ``S <- Norm(S + gain enc(K_e, V_e))``.

In all of them a row of evicted tokens is ``k = W_K K_e``, ``v = W_V V_e`` (``[B, E, R]``) and ``c = k q^T / sqrt(R)``
(``[B, E, Q]``): the paper's update is the outer product of the content ``c`` and the address ``v`` of each token, since
an adapter reads ``S (B x)``. ``S0`` is the paper's everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_pte.encoder import PTEEncoder
from peft_pte.layer import PTELinear, weight_of
from peft_pte.ops.encode.reference import normalize_rows
from peft_pte.state import Evicted


class VariantEncoder(PTEEncoder):
    """An encoder whose updates are those of :meth:`update`; its start is the paper's."""

    _updating = False
    readers: tuple[PTELinear, ...] = ()
    """The adapted linears of the same layer."""

    def prepare(self, rank: int, queries: int) -> None:
        """Make the parameters of the variant."""

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        """The state ``[B, Q, R]`` after ``content [B, E, Q]`` was evicted at ``address [B, E, R]``.

        ``tokens [B, E, 2 R]`` are the projected keys and values, for gates.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `update`.")

    def forward(self, adapter_name: str, state: Tensor, evicted: Evicted) -> Tensor:
        """As in :class:`PTEEncoder`."""
        if evicted.valid is not None:
            raise NotImplementedError("`variants` take traces without padding, got a mask. Leave the mask out.")
        self._updating = True
        try:
            return super().forward(adapter_name, state, evicted)
        finally:
            self._updating = False

    def _encode(self, adapter_name: str, state: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        if not self._updating:
            return super()._encode(adapter_name, state, keys, values, valid)
        query = functional.linear(
            weight_of(self.pte_global_tokens[adapter_name]), weight_of(self.pte_query[adapter_name])
        )
        projected = functional.linear(keys, weight_of(self.pte_key[adapter_name]))
        address = functional.linear(values, weight_of(self.pte_value[adapter_name]))
        content = functional.linear(projected, query) / math.sqrt(query.shape[-1])
        gain = self.settings[adapter_name].gain
        return self.update(state, content, address, torch.cat([projected, address], dim=-1), gain)


class Unit(VariantEncoder):
    """The paper's update of keys and values of mean square 1: its size no longer depends on the base model's."""

    def _encode(self, adapter_name: str, state: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        if self._updating:
            keys, values = (functional.rms_norm(rows, rows.shape[-1:]) for rows in (keys, values))
        return super()._encode(adapter_name, state, keys, values, valid)

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(state + gain * content.mT @ address / content.shape[1])


class ByKey(Unit):
    """``Unit`` with the roles of keys and values exchanged: ``S' = (W_Q h_g) (W_K V_e)^T (W_V K_e)``.

    An adapter reads ``S (B x)``, so what stands on the right is the address: a key is what a token is found by, and a
    value is what it has to say.
    """

    def _encode(self, adapter_name: str, state: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        if self._updating:
            keys, values = values, keys
        return super()._encode(adapter_name, state, keys, values, valid)


class AttentionStart(ByKey):
    """``ByKey`` whose adapters start by asking what the frozen attention asks.

    The address of a token is a projection ``P`` of its key, and linears that read the hidden states of the layer start
    with ``B = P W_q``: what they read from the state is the layer's own attention over the evicted tokens, without its
    softmax.
    """

    @torch.no_grad()
    def prepare(self, rank: int, queries: int) -> None:
        attention = self._outside[0]
        query = weight_of(attention.q_proj.get_base_layer())
        heads = query.reshape(-1, attention.head_dim, query.shape[1])
        # Query heads that share a key head ask together.
        shared = heads.reshape(self.width // attention.head_dim, -1, *heads.shape[1:]).mean(dim=1).flatten(0, 1)
        for adapter in self.settings:
            address = weight_of(self.pte_value[adapter])
            nn.init.orthogonal_(address)
            down = address @ shared
            down = down * (weight_of(attention.q_proj.pte_down[adapter]).std() / down.std())
            for linear in self.readers:
                if linear.holds(adapter) and linear.in_features == query.shape[1] and "o_proj" not in linear.name:
                    weight_of(linear.pte_down[adapter]).copy_(down)


class RowGain(VariantEncoder):
    """A learned gain per row, from 0.03 to 1 at the start: rows of different time scales."""

    def prepare(self, rank: int, queries: int) -> None:
        self.row_gain = nn.Parameter(torch.linspace(math.log(0.03), 0.0, queries))

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        step = content.mT @ address / content.shape[1]
        return normalize_rows(state + self.row_gain.exp()[:, None] * step)


class Gate(VariantEncoder):
    """A learned gate per evicted token on the paper's update: what is not worth keeping is not written."""

    def prepare(self, rank: int, queries: int) -> None:
        self.gate = nn.Linear(2 * rank, 1)

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(state + gain * (self.gate(tokens).sigmoid() * content).mT @ address / content.shape[1])


class Frobenius(VariantEncoder):
    """One norm for all rows: the mean square of the rows' norms is 1."""

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        added = state + gain * content.mT @ address / content.shape[1]
        return added / (added.square().sum(dim=(-2, -1), keepdim=True) / added.shape[1]).clamp(min=1e-12).sqrt()


class Ball(VariantEncoder):
    """Rows are shortened to norm 1 only if they are longer: an empty state forgets nothing."""

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        added = state + gain * content.mT @ address / content.shape[1]
        return added / added.square().sum(dim=-1, keepdim=True).clamp(min=1.0).sqrt()


class Sum(VariantEncoder):
    """No normalisation after ``S0``: nothing is ever forgotten."""

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return state + gain * content.mT @ address / content.shape[1]


class Delta(VariantEncoder):
    """The delta rule, token by token in order: what an address held is replaced, other addresses are left alone.

    ``S <- S + b (c - S a) a^T`` with a unit address ``a`` and a learned gate ``b`` in (0, 1), for all ``E`` tokens at once:
    the corrections ``U`` solve ``(I + tril(b A A^T, -1)) U = b (C - A S^T)``, then ``S <- S + U^T A``.
    """

    def prepare(self, rank: int, queries: int) -> None:
        self.gate = nn.Linear(2 * rank, 1)
        nn.init.constant_(self.gate.bias, -1.0)

    def corrected(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor) -> Tensor:
        """The state after the corrections, before any normalisation."""
        gate = self.gate(tokens).sigmoid()
        unit = functional.normalize(address, dim=-1, eps=1e-6)
        overlap = (gate * (unit @ unit.mT)).tril(-1) + torch.eye(unit.shape[1], device=unit.device)
        wanted = gate * (content - unit @ state.mT)
        corrections = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
        return state + corrections.mT @ unit

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return self.corrected(state, content, address, tokens)


class DeltaNorm(Delta):
    """The delta rule, then rows of norm 1."""

    def update(self, state: Tensor, content: Tensor, address: Tensor, tokens: Tensor, gain: float) -> Tensor:
        return normalize_rows(self.corrected(state, content, address, tokens))


VARIANTS: dict[str, type[VariantEncoder]] = {
    "unit": Unit,
    "by-key": ByKey,
    "attention-start": AttentionStart,
    "row-gain": RowGain,
    "gate": Gate,
    "frobenius": Frobenius,
    "ball": Ball,
    "sum": Sum,
    "delta": Delta,
    "delta-norm": DeltaNorm,
}


def install(model: nn.Module, name: str) -> None:
    """Give every encoder of ``model`` the update ``name``, and the parameters that it needs.

    Raises:
        ValueError: ``name`` is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {name!r}.")
    linears = [module for module in model.modules() if isinstance(module, PTELinear)]
    for module in list(model.modules()):
        if isinstance(module, PTEEncoder):
            settings = next(iter(module.settings.values()))
            module.__class__ = VARIANTS[name]
            assert isinstance(module, VariantEncoder)
            index = module._outside[0].layer_idx
            module.readers = tuple(linear for linear in linears if linear.layer_index == index)
            module.prepare(settings.rank, settings.num_queries)
            module.to(module.beside.device)
