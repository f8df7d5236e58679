"""The adapters' reading of the thought state as Triton kernels; derivation in ``ops/README.md``.

Forward: ``_read_kernel`` computes ``h = x B^T`` and ``z = h S^T`` for a block of tokens of one sequence, so that ``x``
is read once; ``_expand_kernel`` computes ``scale * z A^T``. Backward: ``_state_kernel`` turns ``dz`` into ``dh`` and
``dS``; the gradients of ``x``, ``A`` and ``B`` are plain matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 32
BLOCK_IN = 64
BLOCK_OUT = 64
# tl.dot wants at least 16 along every axis.
MIN_BLOCK = 16


@triton.jit
def _read_kernel(
    p_x,
    p_down,
    p_state,
    p_low,
    p_read,
    T,
    inner,
    Q,
    R,
    b_T: tl.constexpr,
    b_I: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_t = (tl.program_id(1) * b_T + tl.arange(0, b_T)).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_t = o_t < T
    m_r = o_r < R
    low = tl.zeros((b_T, b_R), dtype=DTYPE)
    for first in range(0, inner, b_I):
        o_i = first + tl.arange(0, b_I)
        m_i = o_i < inner
        x = tl.load(p_x + (row * T + o_t[:, None]) * inner + o_i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
        down = tl.load(p_down + o_r[None, :] * inner + o_i[:, None], mask=m_i[:, None] & m_r[None, :], other=0.0)
        low += tl.dot(x, down, input_precision="ieee", out_dtype=DTYPE)
    m_qr = (o_q < Q)[:, None] & m_r[None, :]
    state = tl.load(p_state + row * Q * R + o_q[:, None] * R + o_r[None, :], mask=m_qr, other=0.0).to(DTYPE)
    read = tl.dot(low, tl.trans(state), input_precision="ieee", out_dtype=DTYPE)
    tl.store(p_low + (row * T + o_t[:, None]) * R + o_r[None, :], low, mask=m_t[:, None] & m_r[None, :])
    tl.store(p_read + (row * T + o_t[:, None]) * Q + o_q[None, :], read, mask=m_t[:, None] & (o_q < Q)[None, :])


@triton.jit
def _expand_kernel(
    p_read,
    p_up,
    p_out,
    scale,
    N,
    outer,
    Q,
    b_T: tl.constexpr,
    b_O: tl.constexpr,
    b_Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    o_n = (tl.program_id(0) * b_T + tl.arange(0, b_T)).to(tl.int64)
    o_o = (tl.program_id(1) * b_O + tl.arange(0, b_O)).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    m_n = o_n < N
    m_o = o_o < outer
    m_q = o_q < Q
    read = tl.load(p_read + o_n[:, None] * Q + o_q[None, :], mask=m_n[:, None] & m_q[None, :], other=0.0)
    up = tl.load(p_up + o_o[None, :] * Q + o_q[:, None], mask=m_q[:, None] & m_o[None, :], other=0.0).to(DTYPE)
    out = scale * tl.dot(read, up, input_precision="ieee", out_dtype=DTYPE)
    tl.store(p_out + o_n[:, None] * outer + o_o[None, :], out, mask=m_n[:, None] & m_o[None, :])


@triton.jit
def _state_kernel(
    p_grad_read,
    p_low,
    p_state,
    p_grad_low,
    p_grad_state,
    T,
    Q,
    R,
    b_T: tl.constexpr,
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
    state = tl.load(p_state + here, mask=m_qr, other=0.0).to(DTYPE)
    grad_state = tl.zeros((b_Q, b_R), dtype=DTYPE)
    for start in range(0, T, b_T):
        o_t = (start + tl.arange(0, b_T)).to(tl.int64)
        m_t = o_t < T
        m_tq = m_t[:, None] & m_q[None, :]
        m_tr = m_t[:, None] & m_r[None, :]
        grad_read = tl.load(p_grad_read + (row * T + o_t[:, None]) * Q + o_q[None, :], mask=m_tq, other=0.0)
        low = tl.load(p_low + (row * T + o_t[:, None]) * R + o_r[None, :], mask=m_tr, other=0.0)
        grad_low = tl.dot(grad_read, state, input_precision="ieee", out_dtype=DTYPE)
        tl.store(p_grad_low + (row * T + o_t[:, None]) * R + o_r[None, :], grad_low, mask=m_tr)
        grad_state += tl.dot(tl.trans(grad_read), low, input_precision="ieee", out_dtype=DTYPE)
    tl.store(p_grad_state + here, grad_state, mask=m_qr)


def _block(length: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(length))


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, scale: float) -> Tensor:
        batch, tokens, inner = hidden.shape
        (rank, _), (outer, queries) = down.shape, up.shape
        hidden, down, state, up = (operand.contiguous() for operand in (hidden, down, state, up))
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        dtype = tl.float64 if accumulate == torch.float64 else tl.float32
        low = hidden.new_empty(batch, tokens, rank, dtype=accumulate)
        read = hidden.new_empty(batch, tokens, queries, dtype=accumulate)
        out = hidden.new_empty(batch, tokens, outer)
        b_q, b_r = _block(queries), _block(rank)
        _read_kernel[(batch, triton.cdiv(tokens, BLOCK_T))](
            hidden, down, state, low, read, tokens, inner, queries, rank,
            b_T=BLOCK_T, b_I=BLOCK_IN, b_Q=b_q, b_R=b_r, DTYPE=dtype,
        )  # fmt: skip
        rows = batch * tokens
        _expand_kernel[(triton.cdiv(rows, BLOCK_T), triton.cdiv(outer, BLOCK_OUT))](
            read, up, out, scale, rows, outer, queries, b_T=BLOCK_T, b_O=BLOCK_OUT, b_Q=b_q, DTYPE=dtype,
        )  # fmt: skip
        ctx.save_for_backward(hidden, down, state, up, low, read)
        ctx.settings = (scale, b_q, b_r, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, down, state, up, low, read = ctx.saved_tensors
        scale, b_q, b_r, dtype = ctx.settings
        batch, tokens, inner = hidden.shape
        (rank, _), (outer, queries) = down.shape, up.shape
        grad = grads[0].to(low.dtype)
        grad_read = (scale * torch.matmul(grad, up.to(low.dtype))).contiguous()
        grad_low = torch.empty_like(low)
        grad_state = low.new_empty(batch, queries, rank)
        _state_kernel[(batch,)](
            grad_read, low, state, grad_low, grad_state, tokens, queries, rank,
            b_T=BLOCK_T, b_Q=b_q, b_R=b_r, DTYPE=dtype,
        )  # fmt: skip
        grad_hidden = torch.matmul(grad_low, down.to(low.dtype))
        grad_down = grad_low.reshape(-1, rank).mT @ hidden.reshape(-1, inner).to(low.dtype)
        grad_up = scale * (grad.reshape(-1, outer).mT @ read.reshape(-1, queries))
        return (
            grad_hidden.to(hidden.dtype),
            grad_down.to(down.dtype),
            grad_state.to(state.dtype),
            grad_up.to(up.dtype),
            None,
        )


def delta_triton(hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, scale: float) -> Tensor:
    """``[B, T, out]``; arguments as in :func:`peft_pte.ops.delta.api.delta`."""
    # tl.dot multiplies equals: the adapters follow the dtype of what they read.
    result: Tensor = _Delta.apply(hidden, down.to(hidden.dtype), state, up.to(hidden.dtype), scale)
    return result
