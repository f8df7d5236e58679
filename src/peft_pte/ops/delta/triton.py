"""The adapters' reading of the thought state as Triton kernels; derivation in ``ops/README.md``.

Segments (many tokens of a sequence): ``_read_kernel`` computes ``h = x B^T`` and ``z = h S^T`` for a block of tokens of
one sequence, so that ``x`` is read once; ``_state_kernel`` turns ``dz`` into ``dh`` and ``dS``, and the other gradients
are plain matrix products. Decoding (a row per sequence, each with its own ``S``): ``_group_read_kernel`` does it for
several linears at once, split along ``x``. ``_expand_kernel`` serves both: ``base + scale * z A^T``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import accumulator, block, dot, kernel, multiprocessors, upcast_dots
from ..tuning import blocks_for

# Programs add their shares of `h` without talking to each other: the second launch reads one `z` per share.
MOST_SPLITS = 16


@kernel
def _read_kernel(
    p_x,
    p_down,
    p_state,
    p_low,
    p_read,
    s_x,
    s_state,
    T,
    inner,
    Q,
    R,
    b_T: tl.constexpr,
    b_I: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_t = (tl.program_id(1) * b_T + tl.arange(0, b_T)).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_t = o_t < T
    m_r = o_r < R
    p_rows = p_x + row * s_x[0] + o_t[:, None] * s_x[1]
    low = tl.zeros((b_T, b_R), dtype=DTYPE)
    for first in range(0, inner, b_I):
        o_i = first + tl.arange(0, b_I)
        m_i = o_i < inner
        x = tl.load(p_rows + o_i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
        down = tl.load(p_down + o_r[None, :] * inner + o_i[:, None], mask=m_i[:, None] & m_r[None, :], other=0.0)
        low += dot(x.to(down.dtype), down, DTYPE, "ieee", UPCAST)
    m_qr = (o_q < Q)[:, None] & m_r[None, :]
    o_state = row * s_state[0] + o_q[:, None] * s_state[1] + o_r[None, :] * s_state[2]
    state = tl.load(p_state + o_state, mask=m_qr, other=0.0).to(DTYPE)
    read = dot(low, tl.trans(state), DTYPE)
    tl.store(p_low + (row * T + o_t[:, None]) * R + o_r[None, :], low, mask=m_t[:, None] & m_r[None, :])
    tl.store(p_read + (row * T + o_t[:, None]) * Q + o_q[None, :], read, mask=m_t[:, None] & (o_q < Q)[None, :])


@kernel
def _group_read_kernel(
    p_x,
    p_down,
    p_state,
    p_read,
    s_x,
    s_state,
    R,
    N,
    inner,
    per_split,
    Q,
    N_GROUP: tl.constexpr,
    b_N: tl.constexpr,
    b_I: tl.constexpr,
    b_S: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    o_n = (tl.program_id(0) * b_N + tl.arange(0, b_N)).to(tl.int64)
    split = tl.program_id(1)
    which = tl.program_id(2)
    m_n = o_n < N
    first_r = which * R
    o_r = tl.arange(0, b_R)
    m_r = o_r < R
    first_i = split * per_split
    end_i = tl.minimum(first_i + per_split, inner)
    low = tl.zeros((b_N, b_R), dtype=DTYPE)
    for first in range(first_i, end_i, b_I):
        o_i = first + tl.arange(0, b_I)
        m_i = o_i < end_i
        x = tl.load(p_x + o_n[:, None] * s_x + o_i[None, :], mask=m_n[:, None] & m_i[None, :], other=0.0)
        o_down = (first_r + o_r)[None, :].to(tl.int64) * inner + o_i[:, None]
        down = tl.load(p_down + o_down, mask=m_i[:, None] & m_r[None, :], other=0.0)
        low += dot(x.to(down.dtype), down, DTYPE, "ieee", UPCAST)
    # Each row has a state of its own, so this is no matrix product; b_S rows of the states at a time fit in registers.
    for first in tl.static_range(0, b_Q, b_S):
        o_q = first + tl.arange(0, b_S)
        m_q = o_q < Q
        o_state = o_n[:, None, None] * s_state[0] + o_q[None, :, None] * s_state[1]
        m_state = m_n[:, None, None] & m_q[None, :, None] & m_r[None, None, :]
        state = tl.load(p_state + o_state + o_r[None, None, :] * s_state[2], mask=m_state, other=0.0).to(DTYPE)
        read = tl.sum(state * low[:, None, :], axis=2)
        o_read = ((split * N_GROUP + which) * N + o_n[:, None]) * Q + o_q[None, :]
        tl.store(p_read + o_read, read, mask=m_n[:, None] & m_q[None, :])


@kernel
def _expand_kernel(
    p_read,
    p_up,
    p_base,
    p_out,
    s_split,
    s_base,
    s_out,
    N,
    outer,
    Q,
    n_splits,
    SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    b_N: tl.constexpr,
    b_O: tl.constexpr,
    b_Q: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    o_n = (tl.program_id(0) * b_N + tl.arange(0, b_N)).to(tl.int64)
    o_o = (tl.program_id(1) * b_O + tl.arange(0, b_O)).to(tl.int64)
    o_q = tl.arange(0, b_Q)
    m_n = o_n < N
    m_q = o_q < Q
    m_o = o_o < outer
    m_no = m_n[:, None] & m_o[None, :]
    read = tl.zeros((b_N, b_Q), dtype=DTYPE)
    for split in range(0, n_splits):
        o_read = split * s_split + o_n[:, None] * Q + o_q[None, :]
        read += tl.load(p_read + o_read, mask=m_n[:, None] & m_q[None, :], other=0.0).to(DTYPE)
    up = tl.load(p_up + o_o[None, :] * Q + o_q[:, None], mask=m_q[:, None] & m_o[None, :], other=0.0)
    up = up.to(p_out.dtype.element_ty)
    out = SCALE * dot(read.to(up.dtype), up, DTYPE, "ieee", UPCAST)
    if HAS_BASE:
        out += tl.load(p_base + o_n[:, None] * s_base + o_o[None, :], mask=m_no, other=0.0).to(DTYPE)
    tl.store(p_out + o_n[:, None] * s_out + o_o[None, :], out.to(p_out.dtype.element_ty), mask=m_no)


@kernel
def _state_kernel(
    p_grad_read,
    p_low,
    p_state,
    p_grad_low,
    p_grad_state,
    s_state,
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
    o_state = row * s_state[0] + o_q[:, None] * s_state[1] + o_r[None, :] * s_state[2]
    state = tl.load(p_state + o_state, mask=m_qr, other=0.0).to(DTYPE)
    grad_state = tl.zeros((b_Q, b_R), dtype=DTYPE)
    for start in range(0, T, b_T):
        o_t = (start + tl.arange(0, b_T)).to(tl.int64)
        m_t = o_t < T
        m_tq = m_t[:, None] & m_q[None, :]
        m_tr = m_t[:, None] & m_r[None, :]
        grad_read = tl.load(p_grad_read + (row * T + o_t[:, None]) * Q + o_q[None, :], mask=m_tq, other=0.0).to(DTYPE)
        low = tl.load(p_low + (row * T + o_t[:, None]) * R + o_r[None, :], mask=m_tr, other=0.0).to(DTYPE)
        grad_low = dot(grad_read, state, DTYPE)
        tl.store(p_grad_low + (row * T + o_t[:, None]) * R + o_r[None, :], grad_low, mask=m_tr)
        grad_state += dot(tl.trans(grad_read), low, DTYPE)
    here = row * Q * R + o_q[:, None] * R + o_r[None, :]
    tl.store(p_grad_state + here, grad_state, mask=m_qr)


def _expand(read: Tensor, up: Tensor, base: Tensor | None, out: Tensor, scale: float, shape: str) -> None:
    """``out = base + scale * z A^T`` where ``z`` is the sum of ``read [splits, N, Q]``; ``base`` and ``out`` are ``[N, out]``."""
    splits, rows, queries = read.shape
    config = blocks_for("delta_expand", out.dtype, read.device, shape)
    outer, under = up.shape[0], out if base is None else base
    _expand_kernel[(triton.cdiv(rows, config["b_N"]), triton.cdiv(outer, config["b_O"]))](
        read,
        up.contiguous(),
        under,
        out,
        read.stride(0),
        under.stride(0),
        out.stride(0),
        rows,
        outer,
        queries,
        splits,
        # A constant of the compilation: as an argument it would be a float32.
        SCALE=scale,
        HAS_BASE=base is not None,
        b_Q=block(queries),
        DTYPE=accumulator(out.dtype)[1],
        UPCAST=upcast_dots(out),
        **config,
    )


@torch.library.custom_op("peft_pte::delta_forward", mutates_args=())
def _forward(
    hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, onto: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs: ``h [B, T, R]`` and ``z [B, T, Q]``."""
    batch, tokens, inner = hidden.shape
    (rank, _), (outer, queries) = down.shape, up.shape
    hidden = hidden if hidden.stride(-1) == 1 or inner == 1 else hidden.contiguous()
    _, sums = accumulator(down.dtype)
    low = down.new_empty(batch, tokens, rank)
    read = down.new_empty(batch, tokens, queries)
    out = (down if onto is None else onto).new_empty(batch, tokens, outer)
    config = blocks_for("delta_read", down.dtype, hidden.device)
    _read_kernel[(batch, triton.cdiv(tokens, config["b_T"]))](
        hidden,
        down.contiguous(),
        state,
        low,
        read,
        hidden.stride()[:2],
        state.stride(),
        tokens,
        inner,
        queries,
        rank,
        b_Q=block(queries),
        b_R=block(rank),
        DTYPE=sums,
        UPCAST=upcast_dots(down),
        **config,
    )
    rows = batch * tokens
    base = None if onto is None else onto.reshape(rows, outer).contiguous()
    _expand(read.view(1, rows, queries), up, base, out.view(rows, outer), scale, "segment")
    return out, low, read


@_forward.register_fake
def _(
    hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, onto: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = hidden.shape[:2]
    out = (down if onto is None else onto).new_empty(*shape, up.shape[0])
    return out, down.new_empty(*shape, down.shape[0]), down.new_empty(*shape, up.shape[1])


@torch.library.custom_op("peft_pte::delta_state_backward", mutates_args=())
def _state_backward(grad_read: Tensor, low: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, rank = low.shape
    queries = state.shape[1]
    grad_low, grad_state = low.new_empty(low.shape), state.new_empty(state.shape)
    _state_kernel[(batch,)](
        grad_read.contiguous(),
        low.contiguous(),
        state,
        grad_low,
        grad_state,
        state.stride(),
        tokens,
        queries,
        rank,
        b_Q=block(queries),
        b_R=block(rank),
        DTYPE=accumulator(low.dtype)[1],
        **blocks_for("delta_state", low.dtype, low.device),
    )
    return grad_low, grad_state


@_state_backward.register_fake
def _(grad_read: Tensor, low: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return low.new_empty(low.shape), state.new_empty(state.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, down, state, up, onto, scale = inputs
    ctx.save_for_backward(hidden, down, state, up, *output[1:])
    ctx.scale, ctx.onto = scale, None if onto is None else onto.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, down, state, up, low, read = ctx.saved_tensors
    grad_onto = None if ctx.onto is None else grad.to(ctx.onto)
    grad = grad.to(down.dtype)
    grad_low, grad_state = _state_backward(torch.matmul(grad, up.to(grad.dtype)) * ctx.scale, low, state)
    grad_hidden = torch.matmul(grad_low, down).to(hidden.dtype) if ctx.needs_input_grad[0] else None
    # Cast again: kept is what the linears that read it share.
    cast = hidden.flatten(end_dim=1).to(down.dtype) if ctx.needs_input_grad[1] else None
    grad_down = None if cast is None else grad_low.flatten(end_dim=1).mT @ cast
    grad_up = (grad.flatten(end_dim=1).mT @ read.flatten(end_dim=1)) * ctx.scale if ctx.needs_input_grad[3] else None
    return (
        grad_hidden,
        grad_down,
        grad_state,
        None if grad_up is None else grad_up.to(up.dtype),
        grad_onto,
        None,
    )


_forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("peft_pte::delta_read", mutates_args=())
def _read(hidden: Tensor, down: Tensor, state: Tensor) -> Tensor:
    """``[splits, linears, B, Q]``, shares of ``z`` of each linear."""
    rows, _, inner = hidden.shape
    queries, rank = state.shape[1:]
    group = down.shape[0] // rank
    hidden = hidden if hidden.stride(-1) == 1 or inner == 1 else hidden.contiguous()
    config = blocks_for("delta_group_read", down.dtype, hidden.device)
    row_blocks, splits, per_split = _splits(hidden, group, config)
    dtype, sums = accumulator(down.dtype)
    read = hidden.new_empty(splits, group, rows, queries, dtype=dtype)
    _group_read_kernel[(row_blocks, splits, group)](
        hidden,
        down.contiguous(),
        state,
        read,
        hidden.stride(0),
        state.stride(),
        rank,
        rows,
        inner,
        per_split,
        queries,
        N_GROUP=group,
        b_Q=block(queries),
        b_R=block(rank),
        DTYPE=sums,
        UPCAST=upcast_dots(down),
        **config,
    )
    return read


def _splits(hidden: Tensor, group: int, config: dict[str, int]) -> tuple[int, int, int]:
    """Blocks of rows, splits along ``x``, and elements of ``x`` in each."""
    rows, _, inner = hidden.shape
    row_blocks = triton.cdiv(rows, config["b_N"])
    # Enough programs for the device, each with at least four steps along `x`.
    wanted = triton.cdiv(2 * multiprocessors(hidden.device), row_blocks * group)
    steps = triton.cdiv(inner, config["b_I"])
    per_split = triton.cdiv(steps, max(1, min(wanted, steps // 4, MOST_SPLITS))) * config["b_I"]
    return row_blocks, triton.cdiv(inner, per_split), per_split


@_read.register_fake
def _(hidden: Tensor, down: Tensor, state: Tensor) -> Tensor:
    queries, rank = state.shape[1:]
    group = down.shape[0] // rank
    _, splits, _ = _splits(hidden, group, blocks_for("delta_group_read", down.dtype, hidden.device))
    return hidden.new_empty(splits, group, hidden.shape[0], queries, dtype=accumulator(down.dtype)[0])


@torch.library.custom_op("peft_pte::delta_add_", mutates_args=("base",))
def _add(base: Tensor, read: Tensor, up: Tensor, scale: float) -> None:
    _expand(read, up, base, base, scale, "decode")


@_add.register_fake
def _(*args: object) -> None:
    return None


def delta_triton(hidden: Tensor, down: Tensor, state: Tensor, up: Tensor, onto: Tensor | None, scale: float) -> Tensor:
    """``[B, T, out]``; arguments as in :func:`peft_pte.ops.delta.api.delta`."""
    result: Tensor = _forward(hidden, down, state, up, onto, scale)[0]
    return result


def read_triton(hidden: Tensor, down: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """``[splits, B, Q]`` of each linear; arguments as in :func:`peft_pte.ops.delta.api.delta_read`."""
    return _read(hidden, down, state).unbind(1)


def add_triton_(base: Tensor, read: Tensor, up: Tensor, *, alpha: float) -> None:
    """``base [B, out] += alpha * z A^T``, for ``read [splits, B, Q]`` and ``up [Q, out]``, which is ``A^T``."""
    _add(base, read, up.mT, alpha)
