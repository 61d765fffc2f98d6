"""The forward attention kernel: online softmax over the key tiles that a query tile may see, with the gate's epilogue.

Scores are kept in units of log 2 (the softmax scale times log2 e is folded into one factor), sums are float32, and the
probabilities are rounded to the input dtype for the second matmul, as flash attention does (Dao, 2023, algorithm 1).
"""

# pyright types a jitted function as the plain one that it was made from, and what it returns as a tuple.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from trichord_kernels.ops.attention_tiles import (
    INTEGERS,
    LN2,
    LOG2E,
    load_tile,
    locate_tile,
    seen_intervals,
    segment_bounds,
    store_tile,
    tanh_of_half,
    tile_offsets,
    tile_ranges,
)


@triton.jit
def _attend(
    q,
    q_tail,
    acc,
    acc_tail,
    row_sum,
    row_max,
    K_ptr,
    V_ptr,
    k_rows,
    v_rows,
    first,
    size,
    begin,
    end,
    inner_scale,
    outer_scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One key tile into the running softmax. K_ptr and V_ptr point at its first row, `first` of `size`."""
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < size
    k = load_tile(K_ptr, k_rows, inside, H, 0, MAIN, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if TAIL:
        k_tail = load_tile(K_ptr, k_rows, inside, H, MAIN, TAIL, MASKED)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
    if SOFTCAP:
        scores = tanh_of_half(scores * inner_scale, q.dtype == tl.float32)
    if MASKED:
        seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        scores = tl.where(seen, scores * outer_scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - base[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * outer_scale)
        base = new_max
        p = tl.exp2(scores * outer_scale - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(p, axis=1)
    v = load_tile(V_ptr, v_rows, inside, H, 0, MAIN, MASKED)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    if TAIL:
        v_tail = load_tile(V_ptr, v_rows, inside, H, MAIN, TAIL, MASKED)
        acc_tail = tl.dot(p, v_tail, acc_tail * shrink[:, None], input_precision="ieee")
    return acc, acc_tail, row_sum, new_max


@triton.jit(do_not_specialize=INTEGERS)
def attention_forward_kernel(
    Q_ptr,
    K_ptr,
    V_ptr,
    Out_ptr,
    Lse_ptr,
    Hidden_ptr,
    Gate_ptr,
    Gated_ptr,
    Cu_q_ptr,
    Cu_k_ptr,
    Used_k_ptr,
    Span_begins_ptr,
    Span_ends_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    num_segments,
    total_q,
    groups,
    left,
    right,
    align_ends,
    inner_scale,
    outer_scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GATE_PER_HEAD: tl.constexpr,
):
    """out and lse of one tile of BLOCK_M queries of one head; grid (slots, N), the longest causal tiles first."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, q_begin, q_end, first_row = locate_tile(slot, Cu_q_ptr, num_segments, total_q, BLOCK_M)
    if first_row >= q_end:
        return
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    k_begin, k_end = segment_bounds(Cu_k_ptr, Used_k_ptr, segment, num_segments)
    shift = k_begin - q_begin + align_ends * (k_end - k_begin - q_end + q_begin)
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < q_end
    begin, end = seen_intervals(rows, valid, shift, left, right, k_begin, k_end, Span_begins_ptr, Span_ends_ptr)
    low, size, num_left, num_full, num_edges, begin, end = tile_ranges(begin, end, valid, BLOCK_N)

    q_rows = tile_offsets(BLOCK_M, q_row_stride, STRIDE_UNIT)
    q_row_stride = q_row_stride.to(tl.int64) * STRIDE_UNIT
    k_rows = tile_offsets(BLOCK_N, k_row_stride, STRIDE_UNIT)
    k_row_stride = k_row_stride.to(tl.int64) * STRIDE_UNIT
    v_rows = tile_offsets(BLOCK_N, v_row_stride, STRIDE_UNIT)
    v_row_stride = v_row_stride.to(tl.int64) * STRIDE_UNIT
    Q_ptr += head * q_head_stride * STRIDE_UNIT + first_row * q_row_stride
    K_ptr += head // groups * k_head_stride * STRIDE_UNIT + low * k_row_stride
    V_ptr += head // groups * v_head_stride * STRIDE_UNIT + low * v_row_stride

    q = load_tile(Q_ptr, q_rows, valid, H, 0, MAIN, True)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    q_tail, acc_tail = q, acc
    if TAIL:
        q_tail = load_tile(Q_ptr, q_rows, valid, H, MAIN, TAIL, True)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.range(num_edges, num_stages=EDGE_STAGES, disable_licm=True):  # on both sides of the full tiles
        at = tl.where(i < num_left, i, i + num_full) * BLOCK_N
        acc, acc_tail, row_sum, row_max = _attend(
            q, q_tail, acc, acc_tail, row_sum, row_max, K_ptr + at * k_row_stride, V_ptr + at * v_row_stride,
            k_rows, v_rows, at, size, begin, end, inner_scale, outer_scale,
            H, MAIN, TAIL, BLOCK_N, SOFTCAP, True,
        )  # fmt: skip
    K_ptr += num_left * BLOCK_N * k_row_stride
    V_ptr += num_left * BLOCK_N * v_row_stride
    for _ in tl.range(num_full, disable_licm=True):
        acc, acc_tail, row_sum, row_max = _attend(
            q, q_tail, acc, acc_tail, row_sum, row_max, K_ptr, V_ptr,
            k_rows, v_rows, 0, size, begin, end, inner_scale, outer_scale,
            H, MAIN, TAIL, BLOCK_N, SOFTCAP, False,
        )  # fmt: skip
        K_ptr += BLOCK_N * k_row_stride
        V_ptr += BLOCK_N * v_row_stride

    empty = row_sum == 0.0  # the row sees nothing; a NaN among what it sees is not taken for that
    row_sum = tl.where(empty, 1.0, row_sum)
    share = (1.0 / row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)
    tl.store(Lse_ptr + head * total_q + rows, lse, mask=valid)
    out_offsets = tile_offsets(BLOCK_M, num_heads, H)
    base = (first_row * num_heads.to(tl.int64) + head) * H
    out = tl.where(empty[:, None], 0.0, acc * share)
    store_tile(Out_ptr + base, out_offsets, valid, out, H, 0, MAIN)
    if Gate_ptr is not None:
        gate = tl.load(Gate_ptr + head * GATE_PER_HEAD).to(tl.float32)
        gate = tanh_of_half(gate * 2.0 * LOG2E, True)
        hidden = load_tile(Hidden_ptr + base, out_offsets, valid, H, 0, MAIN, True)
        store_tile(Gated_ptr + base, out_offsets, valid, hidden.to(tl.float32) + gate * out, H, 0, MAIN)
    if TAIL:
        out_tail = tl.where(empty[:, None], 0.0, acc_tail * share)
        store_tile(Out_ptr + base, out_offsets, valid, out_tail, H, MAIN, TAIL)
        if Gate_ptr is not None:
            hidden = load_tile(Hidden_ptr + base, out_offsets, valid, H, MAIN, TAIL, True)
            store_tile(Gated_ptr + base, out_offsets, valid, hidden.to(tl.float32) + gate * out_tail, H, MAIN, TAIL)
