"""An eviction's update of all thought states as Triton kernels; derivation in ``ops/README.md``.

``_compress_kernel``: one program per layer and sequence reads the evicted keys and values once, straight from their
slots. Where there are too few layers and sequences to fill the device, the evicted tokens are split over programs, whose
partial sums ``_combine_kernel`` adds in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import accumulator, block, dot, kernel, multiprocessors, row_of_bytes, shares, tile
from ..tuning import blocks_for


@triton.jit
def _finish(p_state, s_state, layer, row, update, GAIN: tl.constexpr, Q, R, b_Q: tl.constexpr, b_R: tl.constexpr):
    o_q = tl.arange(0, b_Q).to(tl.int64)
    o_r = tl.arange(0, b_R).to(tl.int64)
    m_qr = (o_q < Q)[:, None] & (o_r < R)[None, :]
    p_here = p_state + layer * s_state[0] + row * s_state[1] + o_q[:, None] * s_state[2] + o_r[None, :] * s_state[3]
    state = tl.load(p_here, mask=m_qr, other=0.0) + GAIN * update
    square = tl.sum(state * state, axis=1)
    tl.store(p_here, state / tl.sqrt(tl.where(square > 0, square, 1.0))[:, None], mask=m_qr)


@kernel
def _compress_kernel(
    p_state,
    p_keys,
    p_values,
    p_slots,
    p_folded,
    p_wv,
    p_cos,
    p_sin,
    p_valid,
    p_rows,
    p_update,
    p_peak,
    p_total,
    s_state,
    s_keys,
    s_values,
    s_cos,
    s_sin,
    s_valid,
    L,
    G,
    E,
    per_split,
    GAIN: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    b_E: tl.constexpr,
    b_P: tl.constexpr,
    b_K: tl.constexpr,
    b_V: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Layers vary fastest: programs that run side by side share the cosines of a few sequences in L2.
    layer = (tl.program_id(0) % L).to(tl.int64)
    # Which of the rows that are due, and which of all.
    due = (tl.program_id(0) // L).to(tl.int64)
    row = due
    if HAS_ROWS:
        row = tl.load(p_rows + due)
    split = tl.program_id(1)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_r = o_r < R
    D = G * HEAD_DIM
    # A stride may fit 32 bits where its product with a head does not.
    s_head_k = tl.full((), 1, tl.int64) * s_keys[2]
    s_head_v = tl.full((), 1, tl.int64) * s_values[2]
    p_keys += layer * s_keys[0] + row * s_keys[1]
    p_values += layer * s_values[0] + row * s_values[1]
    p_folded += layer * Q * D
    p_wv += layer * R * D
    update = tl.zeros((b_Q, b_R), dtype=DTYPE)
    peak = tl.full((b_Q,), float("-inf"), dtype=DTYPE)
    total = tl.zeros((b_Q,), dtype=DTYPE)
    first_e = split * per_split
    end_e = tl.minimum(first_e + per_split, E)
    for start in range(first_e, end_e, b_E):
        o_e = (start + tl.arange(0, b_E)).to(tl.int64)
        m_e = o_e < end_e
        if HAS_VALID:
            m_e &= tl.load(p_valid + due * s_valid[0] + o_e * s_valid[1], mask=m_e, other=0) != 0
        # Masked from here on: nothing of a padded token is read, so it contributes zero whatever its slot holds.
        slot = tl.load(p_slots + due * E + o_e, mask=m_e, other=0)
        p_rows_k = p_keys + slot[:, None] * s_keys[3]
        p_rows_v = p_values + slot[:, None] * s_values[3]
        scores = tl.zeros((b_E, b_Q), dtype=DTYPE)
        for first in range(0, HALF, b_P):
            # Both dimensions of a pair are in registers together, so that each byte of the keys is read once.
            o_p = first + tl.arange(0, b_P)
            m_p = o_p < HALF
            m_ep = m_e[:, None] & m_p[None, :]
            m_pq = m_p[:, None] & m_q[None, :]
            o_one = o_p
            o_two = o_p + HALF
            if INTERLEAVED:
                o_one = 2 * o_p
                o_two = 2 * o_p + 1
            here = due * s_cos[0] + o_e[:, None] * s_cos[1] + o_one[None, :] * s_cos[2]
            cos = tl.load(p_cos + here, mask=m_ep, other=0.0).to(DTYPE)
            here = due * s_sin[0] + o_e[:, None] * s_sin[1] + o_one[None, :] * s_sin[2]
            sin = tl.load(p_sin + here, mask=m_ep, other=0.0).to(DTYPE)
            for head in range(0, G):
                p_head = p_rows_k + head * s_head_k
                if INTERLEAVED:
                    o_pair = 2 * first + tl.arange(0, 2 * b_P)
                    m_pair = m_e[:, None] & (o_pair < 2 * HALF)[None, :]
                    pairs = tl.load(p_head + o_pair[None, :], mask=m_pair, other=0.0)
                    one, two = tl.split(tl.reshape(pairs, (b_E, b_P, 2)))
                else:
                    one = tl.load(p_head + o_one[None, :], mask=m_ep, other=0.0)
                    two = tl.load(p_head + o_two[None, :], mask=m_ep, other=0.0)
                one = one.to(DTYPE)
                two = two.to(DTYPE)
                p_query = p_folded + o_q[None, :] * D + head * HEAD_DIM
                query_one = tl.load(p_query + o_one[:, None], mask=m_pq, other=0.0)
                query_two = tl.load(p_query + o_two[:, None], mask=m_pq, other=0.0)
                plain = one * cos - two * sin
                scores += dot(plain, query_one, DTYPE, PRECISION)
                plain = two * cos + one * sin
                scores += dot(plain, query_two, DTYPE, PRECISION)
        if 2 * HALF < HEAD_DIM:
            n_blocks: tl.constexpr = (HEAD_DIM - 2 * HALF + b_K - 1) // b_K
            for step in range(0, G * n_blocks):
                head = step // n_blocks
                o_d = 2 * HALF + (step % n_blocks) * b_K + tl.arange(0, b_K)
                m_d = o_d < HEAD_DIM
                p_head = p_rows_k + head * s_head_k
                keys = tl.load(p_head + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0)
                p_query = p_folded + o_q[None, :] * D + head * HEAD_DIM
                query = tl.load(p_query + o_d[:, None], mask=m_d[:, None] & m_q[None, :], other=0.0)
                scores += dot(keys.to(DTYPE), query, DTYPE, PRECISION)
        rows_v = tl.zeros((b_E, b_R), dtype=DTYPE)
        n_steps: tl.constexpr = (HEAD_DIM + b_V - 1) // b_V
        for step in range(0, G * n_steps):
            head = step // n_steps
            o_d = (step % n_steps) * b_V + tl.arange(0, b_V)
            m_d = o_d < HEAD_DIM
            p_head = p_rows_v + head * s_head_v
            values = tl.load(p_head + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0)
            p_weight = p_wv + o_r[None, :] * D + head * HEAD_DIM
            wv = tl.load(p_weight + o_d[:, None], mask=m_d[:, None] & m_r[None, :], other=0.0)
            rows_v += dot(values.to(DTYPE), wv.to(DTYPE), DTYPE, PRECISION)
        if SOFTMAX:
            scores = tl.where(m_e[:, None], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=0))
            # A block of padding leaves the peak at -inf, and -inf - -inf is no number.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp(peak - anchor)
            weights = tl.exp(scores - anchor[None, :])
            total = total * shrink + tl.sum(weights, axis=0)
            update = update * shrink[:, None]
            peak = higher
        else:
            weights = scores
            if SLOTS:
                # A padded token has a share as well, and values of zero.
                weights = Q * shares(scores, m_q[None, :], 1)
            total += tl.sum(m_e.to(tl.int32), axis=0).to(DTYPE)
        update += dot(tl.trans(weights.to(DTYPE)), rows_v, DTYPE, PRECISION)
    if SPLIT:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split
        m_qr = m_q[:, None] & m_r[None, :]
        tl.store(p_update + part * Q * R + o_q[:, None] * R + o_r[None, :], update, mask=m_qr)
        tl.store(p_total + part * Q + o_q, total, mask=m_q)
        if SOFTMAX:
            tl.store(p_peak + part * Q + o_q, peak, mask=m_q)
    else:
        update = update / tl.where(total > 0, total, 1.0)[:, None]
        _finish(p_state, s_state, layer, row, update, GAIN, Q, R, b_Q, b_R)


@kernel
def _combine_kernel(
    p_state,
    p_rows,
    p_update,
    p_peak,
    p_total,
    s_state,
    L,
    n_splits,
    GAIN: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    b_Q: tl.constexpr,
    b_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    layer = (tl.program_id(0) % L).to(tl.int64)
    row = (tl.program_id(0) // L).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(p_rows + row)
    o_q = tl.arange(0, b_Q)
    o_r = tl.arange(0, b_R)
    m_q = o_q < Q
    m_qr = m_q[:, None] & (o_r < R)[None, :]
    update = tl.zeros((b_Q, b_R), dtype=DTYPE)
    peak = tl.full((b_Q,), float("-inf"), dtype=DTYPE)
    total = tl.zeros((b_Q,), dtype=DTYPE)
    for split in range(0, n_splits):
        part = tl.program_id(0).to(tl.int64) * n_splits + split
        more = tl.load(p_update + part * Q * R + o_q[:, None] * R + o_r[None, :], mask=m_qr, other=0.0)
        count = tl.load(p_total + part * Q + o_q, mask=m_q, other=0.0)
        if SOFTMAX:
            other_peak = tl.load(p_peak + part * Q + o_q, mask=m_q, other=float("-inf"))
            higher = tl.maximum(peak, other_peak)
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp(peak - anchor)
            grow = tl.exp(other_peak - anchor)
            update = update * shrink[:, None] + more * grow[:, None]
            total = total * shrink + count * grow
            peak = higher
        else:
            update += more
            total += count
    update = update / tl.where(total > 0, total, 1.0)[:, None]
    _finish(p_state, s_state, layer, row, update, GAIN, Q, R, b_Q, b_R)


@torch.library.custom_op("peft_pte::compress_", mutates_args=("state",))
def _compress(
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    folded: Tensor,
    value_projection: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    valid: Tensor | None,
    rows: Tensor | None,
    gain: float,
    attention: str,
    interleaved: bool,
) -> None:
    layers, _, heads, _, head_dim = keys.shape
    queries, rank = state.shape[2:]
    batch, evicted = slots.shape
    mask = row_of_bytes(valid)
    dtype, sums = accumulator(state.dtype)
    # Two programs per multiprocessor, or the evicted tokens are split.
    few = layers * batch < 2 * multiprocessors(state.device)
    config = blocks_for(
        "compress", torch.float64 if dtype == torch.float64 else keys.dtype, state.device, "few" if few else "many"
    )
    b_e, b_d = config.pop("b_E"), config.pop("b_D")
    wanted = triton.cdiv(2 * multiprocessors(state.device), layers * batch) if few else 1
    per_split = triton.cdiv(triton.cdiv(evicted, b_e), wanted) * b_e
    splits = max(1, triton.cdiv(evicted, max(1, per_split)))
    shape = (layers * batch * splits, queries) if splits > 1 else (0, queries)
    update, peak, total = state.new_empty(*shape, rank), state.new_empty(shape), state.new_empty(shape)
    half = 0 if cos is None else cos.shape[-1] // 2
    # The gain is a constant of the compilation: as an argument it would be a float32.
    common = {
        "GAIN": gain,
        "Q": queries,
        "R": rank,
        "HAS_ROWS": rows is not None,
        "SOFTMAX": attention == "softmax",
        "b_Q": block(queries),
        "b_R": block(rank),
        "DTYPE": sums,
    }
    _compress_kernel[(layers * batch, splits)](
        state,
        keys,
        values,
        slots.contiguous(),
        folded.contiguous(),
        value_projection.contiguous(),
        cos,
        sin,
        mask,
        rows,
        update,
        peak,
        total,
        state.stride(),
        keys.stride()[:4],
        values.stride()[:4],
        (0, 0, 0) if cos is None else cos.stride(),
        (0, 0, 0) if sin is None else sin.stride(),
        (0, 0) if mask is None else mask.stride(),
        layers,
        heads,
        evicted,
        per_split,
        HEAD_DIM=head_dim,
        HALF=half,
        INTERLEAVED=interleaved,
        HAS_VALID=mask is not None,
        SPLIT=splits > 1,
        SLOTS=attention == "slots",
        b_E=b_e,
        b_P=tile(max(1, half), b_d),
        b_K=tile(max(1, head_dim - 2 * half), b_d),
        b_V=tile(head_dim, b_d),
        # Half precision fits tf32 without loss, and three products restore what tf32 cuts off the float32 side.
        PRECISION="tf32x3" if keys.dtype.itemsize == 2 and dtype == torch.float32 else "ieee",
        **common,
        **config,
    )
    if splits > 1:
        _combine_kernel[(layers * batch,)](state, rows, update, peak, total, state.stride(), layers, splits, **common)


@_compress.register_fake
def _(*args: object) -> None:
    return None


def compress_triton(
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    valid: Tensor | None,
    rows: Tensor | None,
    gain: float,
    attention: str,
    rotary_style: str,
) -> None:
    """Overwrites ``state``; arguments as in :func:`peft_pte.ops.compress.api.compress_`."""
    root = math.sqrt(query.shape[-1])
    folded = torch.matmul(query.to(state.dtype) / root, key_projection.to(state.dtype))
    _compress(
        state,
        keys,
        values,
        slots,
        folded,
        value_projection,
        cos,
        sin,
        valid,
        rows,
        gain,
        attention,
        rotary_style == "interleaved",
    )
