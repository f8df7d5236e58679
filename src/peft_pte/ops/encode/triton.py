"""The update of the thought state as Triton kernels; derivation in ``ops/README.md``.

Updates ``S'``, forward: one program per sequence and eviction reads ``K_e`` and ``V_e`` once, projects, attends and sums. Backward: one
program turns ``dS'`` into the gradients of the projected rows and of the query; the gradients of the wide operands are then plain
matrix products. Recurrence ``S <- Norm(S + gain S')``, forward and backward: one program per sequence walks over the evictions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..kernels import accumulator, block, dot, kernel, row_of_bytes, shares
from ..tuning import blocks_for


@kernel
def _update_kernel(
    p_query,
    p_keys,
    p_values,
    p_wk,
    p_wv,
    p_valid,
    p_share,
    p_update,
    p_lse,
    p_k,
    p_v,
    E,
    Q,
    R,
    D,
    ROOT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    b_E: tl.constexpr,
    b_D: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_r = o_r < R
    m_qr = m_q[:, None] & m_r[None, :]
    query = tl.load(p_query + o_q[:, None] * R + o_r[None, :], mask=m_qr, other=0.0)
    update = tl.zeros((b_Q, b_R), dtype=DTYPE)
    peak = tl.full((b_Q,), float("-inf"), dtype=DTYPE)
    total = tl.zeros((b_Q,), dtype=DTYPE)
    for start in range(0, E, b_E):
        o_e = (start + tl.arange(0, b_E)).to(tl.int64)
        m_e = o_e < E
        rows_k = tl.zeros((b_E, b_R), dtype=DTYPE)
        rows_v = tl.zeros((b_E, b_R), dtype=DTYPE)
        for first in range(0, D, b_D):
            o_d = first + tl.arange(0, b_D)
            m_ed = m_e[:, None] & (o_d < D)[None, :]
            m_dr = (o_d < D)[:, None] & m_r[None, :]
            wide = (row * E + o_e[:, None]) * D + o_d[None, :]
            keys = tl.load(p_keys + wide, mask=m_ed, other=0.0)
            values = tl.load(p_values + wide, mask=m_ed, other=0.0)
            wk = tl.load(p_wk + o_r[None, :] * D + o_d[:, None], mask=m_dr, other=0.0)
            wv = tl.load(p_wv + o_r[None, :] * D + o_d[:, None], mask=m_dr, other=0.0)
            rows_k += dot(keys, wk, DTYPE)
            rows_v += dot(values, wv, DTYPE)
        narrow = (row * E + o_e[:, None]) * R + o_r[None, :]
        tl.store(p_k + narrow, rows_k, mask=m_e[:, None] & m_r[None, :])
        tl.store(p_v + narrow, rows_v, mask=m_e[:, None] & m_r[None, :])
        scores = dot(query, tl.trans(rows_k), DTYPE) / ROOT
        m_valid = m_e
        if HAS_VALID:
            m_valid = m_e & (tl.load(p_valid + row * E + o_e, mask=m_e, other=0) != 0)
        if SOFTMAX:
            scores = tl.where(m_valid[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            # A block of padding leaves the peak at -inf, and -inf - -inf is no number.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp(peak - anchor)
            weights = tl.exp(scores - anchor[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            update = update * shrink[:, None]
            peak = higher
        else:
            if SLOTS:
                scores = Q * shares(scores, m_q[:, None], 0)
            weights = tl.where(m_valid[None, :], scores, 0.0)
        update += dot(weights.to(DTYPE), rows_v, DTYPE)
    if SOFTMAX:
        some = tl.where(total > 0, total, 1.0)
        update = update / some[:, None]
        lse = tl.where(total > 0, peak + tl.log(some), 0.0)
        tl.store(p_lse + row * Q + o_q, lse.to(DTYPE), mask=m_q)
    else:
        update = update * tl.load(p_share + row)
    here = row * Q * R + o_q[:, None] * R + o_r[None, :]
    tl.store(p_update + here, update.to(DTYPE), mask=m_qr)


@kernel
def _update_backward_kernel(
    p_grad,
    p_update,
    p_lse,
    p_query,
    p_k,
    p_v,
    p_valid,
    p_share,
    p_grad_query,
    p_grad_k,
    p_grad_v,
    E,
    Q,
    R,
    ROOT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    b_E: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_r = o_r < R
    m_qr = m_q[:, None] & m_r[None, :]
    here = row * Q * R + o_q[:, None] * R + o_r[None, :]
    grad_update = tl.load(p_grad + here, mask=m_qr, other=0.0)
    query = tl.load(p_query + o_q[:, None] * R + o_r[None, :], mask=m_qr, other=0.0)
    grad_query = tl.zeros((b_Q, b_R), dtype=DTYPE)
    share = 1.0
    if SOFTMAX:
        lse = tl.load(p_lse + row * Q + o_q, mask=m_q, other=0.0)
        expected = tl.sum(grad_update * tl.load(p_update + here, mask=m_qr, other=0.0), axis=1)
    else:
        share = tl.load(p_share + row)
    for start in range(0, E, b_E):
        o_e = (start + tl.arange(0, b_E)).to(tl.int64)
        m_e = o_e < E
        m_er = m_e[:, None] & m_r[None, :]
        narrow = (row * E + o_e[:, None]) * R + o_r[None, :]
        rows_k = tl.load(p_k + narrow, mask=m_er, other=0.0)
        rows_v = tl.load(p_v + narrow, mask=m_er, other=0.0)
        m_valid = m_e
        if HAS_VALID:
            m_valid = m_e & (tl.load(p_valid + row * E + o_e, mask=m_e, other=0) != 0)
        scores = dot(query, tl.trans(rows_k), DTYPE) / ROOT
        grad_weights = dot(grad_update, tl.trans(rows_v), DTYPE)
        if SOFTMAX:
            scores = tl.where(m_valid[None, :], scores, float("-inf"))
            weights = tl.exp(scores - lse[:, None])
            grad_scores = weights * (grad_weights - expected[:, None])
        else:
            grad_scores = tl.where(m_valid[None, :], grad_weights, 0.0) * share
            if SLOTS:
                scores = Q * shares(scores, m_q[:, None], 0)
                grad_scores = scores * (grad_scores - tl.sum(scores * grad_scores, axis=0)[None, :] / Q)
            weights = tl.where(m_valid[None, :], scores, 0.0) * share
        weights = weights.to(DTYPE)
        grad_scores = (grad_scores / ROOT).to(DTYPE)
        grad_v = dot(tl.trans(weights), grad_update, DTYPE)
        grad_k = dot(tl.trans(grad_scores), query, DTYPE)
        tl.store(p_grad_v + narrow, grad_v, mask=m_er)
        tl.store(p_grad_k + narrow, grad_k, mask=m_er)
        grad_query += dot(grad_scores, rows_k, DTYPE)
    tl.store(p_grad_query + here, grad_query, mask=m_qr)


@kernel
def _recur_kernel(
    p_state, p_update, p_out, p_norm, N, Q, R, GAIN: tl.constexpr, b_Q: tl.constexpr, b_R: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_qr = m_q[:, None] & (o_r < R)[None, :]
    place = o_q[:, None] * R + o_r[None, :]
    state = tl.load(p_state + row * Q * R + place, mask=m_qr, other=0.0)
    for n in range(0, N):
        here = (row * N + n) * Q * R + place
        state += GAIN * tl.load(p_update + here, mask=m_qr, other=0.0)
        square = tl.sum(state * state, axis=1)
        # A row that is exactly zero has no direction, and stays.
        norm = tl.sqrt(tl.where(square > 0, square, 1.0))
        state = (state / norm[:, None]).to(DTYPE)
        tl.store(p_out + here, state, mask=m_qr)
        tl.store(p_norm + (row * N + n) * Q + o_q, norm.to(DTYPE), mask=m_q)


@kernel
def _recur_backward_kernel(
    p_grad, p_out, p_norm, p_grad_state, p_grad_update, N, Q, R, GAIN: tl.constexpr, b_Q: tl.constexpr,
    b_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_qr = m_q[:, None] & (o_r < R)[None, :]
    place = o_q[:, None] * R + o_r[None, :]
    carry = tl.zeros((b_Q, b_R), dtype=DTYPE)
    for step in range(0, N):
        n = N - 1 - step
        here = (row * N + n) * Q * R + place
        grad = carry + tl.load(p_grad + here, mask=m_qr, other=0.0)
        out = tl.load(p_out + here, mask=m_qr, other=0.0)
        norm = tl.load(p_norm + (row * N + n) * Q + o_q, mask=m_q, other=1.0)
        # A zero row was not divided by its norm, so it passes its gradient on; `out` is zero there, and that says so.
        carry = ((grad - out * tl.sum(grad * out, axis=1)[:, None]) / norm[:, None]).to(DTYPE)
        tl.store(p_grad_update + here, (GAIN * carry).to(DTYPE), mask=m_qr)
    tl.store(p_grad_state + row * Q * R + place, carry, mask=m_qr)


@torch.library.custom_op("peft_pte::updates_forward", mutates_args=())
def _updates(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    valid: Tensor | None,
    attention: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``S'`` of every eviction, and what the backward pass needs."""
    batch, evicted, width = keys.shape
    queries, rank = query.shape
    update, lse = query.new_empty(batch, queries, rank), query.new_empty(batch, queries)
    projected_keys, projected_values = (query.new_empty(batch, evicted, rank) for _ in range(2))
    count = query.new_full((batch,), evicted) if valid is None else valid.sum(dim=-1).clamp(min=1).to(query.dtype)
    share = count.reciprocal()
    mask = None if valid is None else row_of_bytes(valid.contiguous())
    _update_kernel[(batch,)](
        query.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        key_projection.contiguous(),
        value_projection.contiguous(),
        mask,
        share,
        update,
        lse,
        projected_keys,
        projected_values,
        evicted,
        queries,
        rank,
        width,
        HAS_VALID=mask is not None,
        **_attention(rank, attention),
        **_blocks(query.dtype, queries, rank),
        **blocks_for("encode", query.dtype, query.device),
    )
    return update, lse, projected_keys, projected_values, share


@_updates.register_fake
def _(query: Tensor, keys: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (queries, rank) = keys.shape[0], query.shape
    narrow = [query.new_empty(batch, keys.shape[1], rank) for _ in range(2)]
    update, lse = query.new_empty(batch, queries, rank), query.new_empty(batch, queries)
    return update, lse, narrow[0], narrow[1], query.new_empty(batch)


@torch.library.custom_op("peft_pte::updates_backward", mutates_args=())
def _updates_backward(
    grad: Tensor,
    update: Tensor,
    lse: Tensor,
    query: Tensor,
    projected_keys: Tensor,
    projected_values: Tensor,
    valid: Tensor | None,
    share: Tensor,
    attention: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query by eviction ``[B N, Q, R]``, and of the projected rows ``[B N, E, R]``."""
    batch, evicted, rank = projected_keys.shape
    queries = query.shape[0]
    grad_query = update.new_empty(update.shape)
    grad_k, grad_v = (update.new_empty(batch, evicted, rank) for _ in range(2))
    mask = None if valid is None else row_of_bytes(valid.contiguous())
    _update_backward_kernel[(batch,)](
        grad.contiguous(),
        update,
        lse,
        query.contiguous(),
        projected_keys,
        projected_values,
        mask,
        share,
        grad_query,
        grad_k,
        grad_v,
        evicted,
        queries,
        rank,
        HAS_VALID=mask is not None,
        **_attention(rank, attention),
        **_blocks(update.dtype, queries, rank),
        **blocks_for("encode_backward", update.dtype, update.device),
    )
    return grad_query, grad_k, grad_v


@_updates_backward.register_fake
def _(grad: Tensor, update: Tensor, lse: Tensor, query: Tensor, projected: Tensor, *_: object) -> tuple[Tensor, ...]:
    return update.new_empty(update.shape), projected.new_empty(projected.shape), projected.new_empty(projected.shape)


@torch.library.custom_op("peft_pte::recur_forward", mutates_args=())
def _recur(state: Tensor, updates: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """``S`` after each eviction ``[B, N, Q, R]``, and the norms its rows were divided by ``[B, N, Q]``."""
    batch, evictions, queries, rank = updates.shape
    out, norm = updates.new_empty(updates.shape), updates.new_empty(batch, evictions, queries)
    _recur_kernel[(batch,)](
        state.contiguous(),
        updates.contiguous(),
        out,
        norm,
        evictions,
        queries,
        rank,
        GAIN=gain,
        **_blocks(state.dtype, queries, rank),
    )
    return out, norm


@_recur.register_fake
def _(state: Tensor, updates: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    return updates.new_empty(updates.shape), updates.new_empty(updates.shape[:-1])


@torch.library.custom_op("peft_pte::recur_backward", mutates_args=())
def _recur_backward(grad: Tensor, out: Tensor, norm: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Gradients of the first state and of the updates."""
    batch, evictions, queries, rank = out.shape
    grad_state, grad_update = out.new_empty(batch, queries, rank), out.new_empty(out.shape)
    _recur_backward_kernel[(batch,)](
        grad.contiguous(),
        out,
        norm,
        grad_state,
        grad_update,
        evictions,
        queries,
        rank,
        GAIN=gain,
        **_blocks(out.dtype, queries, rank),
    )
    return grad_state, grad_update


@_recur_backward.register_fake
def _(grad: Tensor, out: Tensor, norm: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape[0], *out.shape[2:]), out.new_empty(out.shape)


def _attention(rank: int, attention: str) -> dict[str, Any]:
    return {"ROOT": math.sqrt(rank), "SOFTMAX": attention == "softmax", "SLOTS": attention == "slots"}


def _blocks(dtype: torch.dtype, queries: int, rank: int) -> dict[str, Any]:
    # Numbers are constants of the compilation: as arguments they would be float32.
    return {"b_Q": block(queries), "b_R": block(rank), "DTYPE": accumulator(dtype)[1]}


def _setup_updates(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, values, key_projection, value_projection, valid, attention = inputs
    ctx.save_for_backward(*output, query, keys, values, key_projection, value_projection, valid)
    ctx.attention = attention
    ctx.set_materialize_grads(False)


def _grads_of_updates(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (
        update, lse, projected_keys, projected_values, share, query, keys, values, key_projection, value_projection, valid,
    ) = ctx.saved_tensors  # fmt: skip
    rows = (update, lse, query, projected_keys, projected_values, valid, share)
    grad_query, grad_k, grad_v = _updates_backward(grad, *rows, ctx.attention)
    return (
        grad_query.sum(dim=0),
        torch.matmul(grad_k, key_projection),
        torch.matmul(grad_v, value_projection),
        grad_k.flatten(end_dim=1).mT @ keys.flatten(end_dim=1),
        grad_v.flatten(end_dim=1).mT @ values.flatten(end_dim=1),
        None,
        None,
    )


def _setup_recur(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output)
    ctx.gain = inputs[2]
    ctx.set_materialize_grads(False)


def _grads_of_recur(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_recur_backward(grad, *ctx.saved_tensors, ctx.gain), None)


_updates.register_autograd(_grads_of_updates, setup_context=_setup_updates)
_recur.register_autograd(_grads_of_recur, setup_context=_setup_recur)


def updates_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    valid: Tensor | None,
    attention: str,
) -> Tensor:
    """``S' [B N, Q, R]`` of evictions ``[B N, E, D]``; arguments as in :func:`peft_pte.ops.encode.api.encode`."""
    result: Tensor = _updates(query, keys, values, key_projection, value_projection, valid, attention)[0]
    return result


def recur_triton(state: Tensor, updates: Tensor, gain: float) -> Tensor:
    """``S [B, N, Q, R]`` after each of the updates ``[B, N, Q, R]``."""
    result: Tensor = _recur(state, updates, gain)[0]
    return result
