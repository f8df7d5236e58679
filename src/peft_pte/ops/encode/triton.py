"""The update of the thought state as Triton kernels; derivation in ``ops/README.md``.

Forward: one program per sequence reads ``K_e`` and ``V_e`` once, projects, attends, accumulates and normalises.
Backward: one program per sequence turns ``dS`` into the gradients of the projected rows, the query and the old state;
the gradients of the wide operands are then plain matrix products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_E = 32
BLOCK_D = 64
# tl.dot wants at least 16 along every axis.
MIN_BLOCK = 16


@triton.jit
def _forward_kernel(
    p_state,
    p_query,
    p_keys,
    p_values,
    p_wk,
    p_wv,
    p_valid,
    p_share,
    p_out,
    p_norm,
    p_update,
    p_lse,
    p_k,
    p_v,
    gain,
    root,
    E,
    Q,
    R,
    D,
    HAS_VALID: tl.constexpr,
    SOFTMAX: tl.constexpr,
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
            rows_k += tl.dot(keys, wk, input_precision="ieee", out_dtype=DTYPE)
            rows_v += tl.dot(values, wv, input_precision="ieee", out_dtype=DTYPE)
        narrow = (row * E + o_e[:, None]) * R + o_r[None, :]
        tl.store(p_k + narrow, rows_k, mask=m_e[:, None] & m_r[None, :])
        tl.store(p_v + narrow, rows_v, mask=m_e[:, None] & m_r[None, :])
        scores = tl.dot(query, tl.trans(rows_k), input_precision="ieee", out_dtype=DTYPE) / root
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
            weights = tl.where(m_valid[None, :], scores, 0.0)
        update += tl.dot(weights.to(DTYPE), rows_v, input_precision="ieee", out_dtype=DTYPE)
    if SOFTMAX:
        some = tl.where(total > 0, total, 1.0)
        update = update / some[:, None]
        lse = tl.where(total > 0, peak + tl.log(some), 0.0)
        tl.store(p_lse + row * Q + o_q, lse.to(DTYPE), mask=m_q)
    else:
        update = update * tl.load(p_share + row)
    here = row * Q * R + o_q[:, None] * R + o_r[None, :]
    state = tl.load(p_state + here, mask=m_qr, other=0.0) + gain * update
    square = tl.sum(state * state, axis=1)
    norm = tl.sqrt(tl.where(square > 0, square, 1.0))
    tl.store(p_out + here, (state / norm[:, None]).to(DTYPE), mask=m_qr)
    tl.store(p_norm + row * Q + o_q, norm.to(DTYPE), mask=m_q)
    tl.store(p_update + here, update.to(DTYPE), mask=m_qr)


@triton.jit
def _backward_kernel(
    p_grad,
    p_out,
    p_norm,
    p_update,
    p_lse,
    p_query,
    p_k,
    p_v,
    p_valid,
    p_share,
    p_grad_state,
    p_grad_query,
    p_grad_k,
    p_grad_v,
    gain,
    root,
    E,
    Q,
    R,
    HAS_VALID: tl.constexpr,
    SOFTMAX: tl.constexpr,
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
    grad = tl.load(p_grad + here, mask=m_qr, other=0.0)
    out = tl.load(p_out + here, mask=m_qr, other=0.0)
    norm = tl.load(p_norm + row * Q + o_q, mask=m_q, other=1.0)
    query = tl.load(p_query + o_q[:, None] * R + o_r[None, :], mask=m_qr, other=0.0)
    # A zero row was not divided by its norm, so it passes its gradient on; `out` is zero there, and that says so.
    grad_sum = (grad - out * tl.sum(grad * out, axis=1)[:, None]) / norm[:, None]
    tl.store(p_grad_state + here, grad_sum.to(DTYPE), mask=m_qr)
    grad_update = (gain * grad_sum).to(DTYPE)
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
        scores = tl.dot(query, tl.trans(rows_k), input_precision="ieee", out_dtype=DTYPE) / root
        grad_weights = tl.dot(grad_update, tl.trans(rows_v), input_precision="ieee", out_dtype=DTYPE)
        if SOFTMAX:
            scores = tl.where(m_valid[None, :], scores, float("-inf"))
            weights = tl.exp(scores - lse[:, None])
            grad_scores = weights * (grad_weights - expected[:, None])
        else:
            weights = tl.where(m_valid[None, :], scores, 0.0) * share
            grad_scores = tl.where(m_valid[None, :], grad_weights, 0.0) * share
        weights = weights.to(DTYPE)
        grad_scores = (grad_scores / root).to(DTYPE)
        grad_v = tl.dot(tl.trans(weights), grad_update, input_precision="ieee", out_dtype=DTYPE)
        grad_k = tl.dot(tl.trans(grad_scores), query, input_precision="ieee", out_dtype=DTYPE)
        tl.store(p_grad_v + narrow, grad_v, mask=m_er)
        tl.store(p_grad_k + narrow, grad_k, mask=m_er)
        grad_query += tl.dot(grad_scores, rows_k, input_precision="ieee", out_dtype=DTYPE)
    tl.store(p_grad_query + here, grad_query, mask=m_qr)


def _block(length: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(length))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        key_projection: Tensor,
        value_projection: Tensor,
        valid: Tensor | None,
        gain: float,
        softmax: bool,
    ) -> Tensor:
        batch, evicted, width = keys.shape
        queries, rank = query.shape
        state, query, keys, values = (operand.contiguous() for operand in (state, query, keys, values))
        key_projection, value_projection = key_projection.contiguous(), value_projection.contiguous()
        out, update = torch.empty_like(state), torch.empty_like(state)
        norm, lse = state.new_empty(batch, queries), state.new_empty(batch, queries)
        projected_keys, projected_values = (state.new_empty(batch, evicted, rank) for _ in range(2))
        mask = None if valid is None else valid.to(torch.uint8).contiguous()
        count = state.new_full((batch,), evicted) if valid is None else valid.sum(dim=-1).clamp(min=1).to(state.dtype)
        share = count.reciprocal()
        root = math.sqrt(rank)
        dtype = tl.float64 if state.dtype == torch.float64 else tl.float32
        blocks = {"b_E": BLOCK_E, "b_Q": _block(queries), "b_R": _block(rank), "DTYPE": dtype}
        _forward_kernel[(batch,)](
            state,
            query,
            keys,
            values,
            key_projection,
            value_projection,
            mask,
            share,
            out,
            norm,
            update,
            lse,
            projected_keys,
            projected_values,
            gain,
            root,
            evicted,
            queries,
            rank,
            width,
            HAS_VALID=mask is not None,
            SOFTMAX=softmax,
            b_D=BLOCK_D,
            **blocks,
        )
        ctx.save_for_backward(
            out, norm, update, lse, query, projected_keys, projected_values, mask, share,
            keys, values, key_projection, value_projection,
        )  # fmt: skip
        ctx.settings = (gain, root, softmax, blocks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            out, norm, update, lse, query, projected_keys, projected_values, mask, share,
            keys, values, key_projection, value_projection,
        ) = ctx.saved_tensors  # fmt: skip
        gain, root, softmax, blocks = ctx.settings
        grad = grads[0].contiguous()
        batch, evicted, rank = projected_keys.shape
        grad_state, grad_query = torch.empty_like(out), torch.empty_like(out)
        grad_k, grad_v = torch.empty_like(projected_keys), torch.empty_like(projected_values)
        _backward_kernel[(batch,)](
            grad,
            out,
            norm,
            update,
            lse,
            query,
            projected_keys,
            projected_values,
            mask,
            share,
            grad_state,
            grad_query,
            grad_k,
            grad_v,
            gain,
            root,
            evicted,
            query.shape[0],
            rank,
            HAS_VALID=mask is not None,
            SOFTMAX=softmax,
            **blocks,
        )
        wide = (batch * evicted, -1)
        return (
            grad_state,
            grad_query.sum(dim=0),
            torch.matmul(grad_k, key_projection),
            torch.matmul(grad_v, value_projection),
            grad_k.reshape(wide).mT @ keys.reshape(wide),
            grad_v.reshape(wide).mT @ values.reshape(wide),
            None,
            None,
            None,
        )


def encode_triton(
    state: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    valid: Tensor | None,
    gain: float,
    attention: str,
) -> Tensor:
    """``S [B, Q, R]`` after the eviction; arguments as in :func:`peft_pte.ops.encode.api.encode`."""
    result: Tensor = _Encode.apply(
        state, query, keys, values, key_projection, value_projection, valid, gain, attention == "softmax"
    )
    return result
