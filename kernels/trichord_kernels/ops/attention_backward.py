"""The backward attention kernels: dq over the key tiles of a query tile, dk and dv over the query tiles of a key tile.

With p = exp(scores - lse), dp = d_out v^T, delta = rowsum(d_out * out) and ds = p * (dp - delta) * scale:
dq = ds k, dk = ds^T q, dv = p^T d_out (Dao, 2023, algorithm 2); a softcap multiplies ds by 1 - (score / cap)^2.
Each gradient tile belongs to one program, which adds it up in float32 in a fixed order: no atomics, so two runs give
the same bits, and the query heads that share a key head are summed inside its program.
"""

# pyright types a jitted function as the plain one that it was made from, and what it returns as a tuple.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from trichord_kernels.ops.attention_tiles import (
    INTEGERS,
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
def _dq_step(
    q,
    q_tail,
    grad,
    grad_tail,
    lse,
    delta,
    acc,
    acc_tail,
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
    """What one key tile adds to dq / scale. K_ptr and V_ptr point at its first row, `first` of `size`; lse is log 2."""
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < size
    k = load_tile(K_ptr, k_rows, inside, H, 0, MAIN, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    v = load_tile(V_ptr, v_rows, inside, H, 0, MAIN, MASKED)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    k_tail = k
    if TAIL:
        k_tail = load_tile(K_ptr, k_rows, inside, H, MAIN, TAIL, MASKED)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        v_tail = load_tile(V_ptr, v_rows, inside, H, MAIN, TAIL, MASKED)
        dp = tl.dot(grad_tail, tl.trans(v_tail), dp, input_precision="ieee")
    if SOFTCAP:
        scores = tanh_of_half(scores * inner_scale, q.dtype == tl.float32)
    ds = tl.exp2(scores * outer_scale - lse[:, None]) * (dp - delta[:, None])
    if SOFTCAP:
        ds *= 1.0 - scores * scores
    if MASKED:
        seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        ds = tl.where(seen, ds, 0.0)
    ds = ds.to(k.dtype)
    acc = tl.dot(ds, k, acc, input_precision="ieee")
    if TAIL:
        acc_tail = tl.dot(ds, k_tail, acc_tail, input_precision="ieee")
    return acc, acc_tail


@triton.jit(do_not_specialize=INTEGERS)
def attention_dq_kernel(
    Q_ptr,
    K_ptr,
    V_ptr,
    Out_ptr,
    Grad_out_ptr,
    Lse_ptr,
    Delta_ptr,
    Grad_q_ptr,
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
    grad_row_stride,
    grad_head_stride,
    num_segments,
    total_q,
    groups,
    left,
    right,
    align_ends,
    inner_scale,
    outer_scale,
    grad_scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """dq of one tile of BLOCK_M queries of one head; grid (slots, N), the longest causal tiles first.

    Leaves delta, (N, T) float32, for the other kernel.
    """
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
    grad_rows = tile_offsets(BLOCK_M, grad_row_stride, STRIDE_UNIT)
    grad_row_stride = grad_row_stride.to(tl.int64) * STRIDE_UNIT
    Q_ptr += head * q_head_stride * STRIDE_UNIT + first_row * q_row_stride
    Grad_out_ptr += head * grad_head_stride * STRIDE_UNIT + first_row * grad_row_stride
    K_ptr += head // groups * k_head_stride * STRIDE_UNIT + low * k_row_stride
    V_ptr += head // groups * v_head_stride * STRIDE_UNIT + low * v_row_stride
    out_offsets = tile_offsets(BLOCK_M, num_heads, H)
    base = (first_row * num_heads.to(tl.int64) + head) * H

    q = load_tile(Q_ptr, q_rows, valid, H, 0, MAIN, True)
    grad = load_tile(Grad_out_ptr, grad_rows, valid, H, 0, MAIN, True)
    out = load_tile(Out_ptr + base, out_offsets, valid, H, 0, MAIN, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    q_tail, grad_tail, acc_tail = q, grad, acc
    if TAIL:
        q_tail = load_tile(Q_ptr, q_rows, valid, H, MAIN, TAIL, True)
        grad_tail = load_tile(Grad_out_ptr, grad_rows, valid, H, MAIN, TAIL, True)
        out_tail = load_tile(Out_ptr + base, out_offsets, valid, H, MAIN, TAIL, True)
        delta += tl.sum(grad_tail.to(tl.float32) * out_tail.to(tl.float32), axis=1)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    lse = tl.load(Lse_ptr + head * total_q + rows, mask=valid, other=float("inf")) * LOG2E
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # a row that sees nothing, whatever its gradient holds
    tl.store(Delta_ptr + head * total_q + rows, delta, mask=valid)

    for i in tl.range(num_edges, num_stages=EDGE_STAGES, disable_licm=True):  # on both sides of the full tiles
        at = tl.where(i < num_left, i, i + num_full) * BLOCK_N
        acc, acc_tail = _dq_step(
            q, q_tail, grad, grad_tail, lse, delta, acc, acc_tail, K_ptr + at * k_row_stride, V_ptr + at * v_row_stride,
            k_rows, v_rows, at, size, begin, end, inner_scale, outer_scale,
            H, MAIN, TAIL, BLOCK_N, SOFTCAP, True,
        )  # fmt: skip
    K_ptr += num_left * BLOCK_N * k_row_stride
    V_ptr += num_left * BLOCK_N * v_row_stride
    for _ in tl.range(num_full, disable_licm=True):
        acc, acc_tail = _dq_step(
            q, q_tail, grad, grad_tail, lse, delta, acc, acc_tail, K_ptr, V_ptr,
            k_rows, v_rows, 0, size, begin, end, inner_scale, outer_scale,
            H, MAIN, TAIL, BLOCK_N, SOFTCAP, False,
        )  # fmt: skip
        K_ptr += BLOCK_N * k_row_stride
        V_ptr += BLOCK_N * v_row_stride
    store_tile(Grad_q_ptr + base, out_offsets, valid, acc * grad_scale, H, 0, MAIN)
    if TAIL:
        store_tile(Grad_q_ptr + base, out_offsets, valid, acc_tail * grad_scale, H, MAIN, TAIL)


@triton.jit
def _dkdv_step(
    k,
    k_tail,
    v,
    v_tail,
    dk,
    dk_tail,
    dv,
    dv_tail,
    Q_ptr,
    Grad_out_ptr,
    Lse_ptr,
    Delta_ptr,
    q_rows,
    grad_rows,
    first,
    size,
    begin,
    end,
    inner_scale,
    outer_scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one query tile adds to dk / scale and dv. The pointers are at its first row, `first` of `size`."""
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first + tile_rows
    inside = rows < size
    q = load_tile(Q_ptr, q_rows, inside, H, 0, MAIN, MASKED)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    q_tail = q
    if TAIL:
        q_tail = load_tile(Q_ptr, q_rows, inside, H, MAIN, TAIL, MASKED)
        scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision="ieee")
    lse = tl.load(Lse_ptr + tile_rows, mask=inside, other=float("inf")) if MASKED else tl.load(Lse_ptr + tile_rows)
    if SOFTCAP:
        scores = tanh_of_half(scores * inner_scale, q.dtype == tl.float32)
    p = tl.exp2(scores * outer_scale - (lse * LOG2E)[None, :])
    if MASKED:
        seen = (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])
        p = tl.where(seen, p, 0.0)
    grad = load_tile(Grad_out_ptr, grad_rows, inside, H, 0, MAIN, MASKED)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
    if TAIL:
        grad_tail = load_tile(Grad_out_ptr, grad_rows, inside, H, MAIN, TAIL, MASKED)
        dv_tail = tl.dot(p.to(grad.dtype), grad_tail, dv_tail, input_precision="ieee")
        dp = tl.dot(v_tail, tl.trans(grad_tail), dp, input_precision="ieee")
    delta = tl.load(Delta_ptr + tile_rows, mask=inside, other=0.0) if MASKED else tl.load(Delta_ptr + tile_rows)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - scores * scores
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    if TAIL:
        dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
    return dk, dk_tail, dv, dv_tail


@triton.jit(do_not_specialize=INTEGERS)
def attention_dkdv_kernel(
    Q_ptr,
    K_ptr,
    V_ptr,
    Grad_out_ptr,
    Lse_ptr,
    Delta_ptr,
    Grad_k_ptr,
    Grad_v_ptr,
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
    grad_row_stride,
    grad_head_stride,
    num_segments,
    total_q,
    total_k,
    groups,
    left,
    right,
    align_ends,
    inner_scale,
    outer_scale,
    grad_scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """dk and dv of one tile of BLOCK_N keys of one key head, over all its query heads; grid (slots, K)."""
    segment, k_begin, k_stop, first_key = locate_tile(tl.program_id(0), Cu_k_ptr, num_segments, total_k, BLOCK_N)
    if first_key >= k_stop:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    k_begin, k_end = segment_bounds(Cu_k_ptr, Used_k_ptr, segment, num_segments)
    q_begin, q_end = segment_bounds(Cu_q_ptr, None, segment, num_segments)
    shift = k_begin - q_begin + align_ends * (k_end - k_begin - q_end + q_begin)
    keys = first_key + tl.arange(0, BLOCK_N)
    valid = keys < k_end
    # The rule from the key's side: the query at p - shift sees [p - left, p + right).
    begin, end = seen_intervals(
        keys, valid, -shift, right - 1, left + 1, q_begin, q_end, Span_begins_ptr, Span_ends_ptr
    )
    low, size, num_left, num_full, num_edges, begin, end = tile_ranges(begin, end, valid, BLOCK_M)

    q_rows = tile_offsets(BLOCK_M, q_row_stride, STRIDE_UNIT)
    q_row_stride = q_row_stride.to(tl.int64) * STRIDE_UNIT
    k_rows = tile_offsets(BLOCK_N, k_row_stride, STRIDE_UNIT)
    k_row_stride = k_row_stride.to(tl.int64) * STRIDE_UNIT
    v_rows = tile_offsets(BLOCK_N, v_row_stride, STRIDE_UNIT)
    v_row_stride = v_row_stride.to(tl.int64) * STRIDE_UNIT
    grad_rows = tile_offsets(BLOCK_M, grad_row_stride, STRIDE_UNIT)
    grad_row_stride = grad_row_stride.to(tl.int64) * STRIDE_UNIT
    K_ptr += kv_head * k_head_stride * STRIDE_UNIT + first_key * k_row_stride
    V_ptr += kv_head * v_head_stride * STRIDE_UNIT + first_key * v_row_stride

    k = load_tile(K_ptr, k_rows, valid, H, 0, MAIN, True)
    v = load_tile(V_ptr, v_rows, valid, H, 0, MAIN, True)
    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, MAIN), tl.float32)
    k_tail, v_tail, dk_tail, dv_tail = k, v, dk, dv
    if TAIL:
        k_tail = load_tile(K_ptr, k_rows, valid, H, MAIN, TAIL, True)
        v_tail = load_tile(V_ptr, v_rows, valid, H, MAIN, TAIL, True)
        dk_tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
        dv_tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    # Heads and tiles are one loop, so that its pipeline fills once; `tile` and `group` count as an odometer does.
    q_head_stride, grad_head_stride = q_head_stride.to(tl.int64), grad_head_stride.to(tl.int64)
    first_head, wide_total = kv_head * groups, total_q.to(tl.int64)
    Q_ptr += first_head * q_head_stride * STRIDE_UNIT + low * q_row_stride
    Grad_out_ptr += first_head * grad_head_stride * STRIDE_UNIT + low * grad_row_stride
    Lse_ptr += first_head * total_q + low
    Delta_ptr += first_head * total_q + low
    group, tile = 0, 0
    for _ in tl.range(groups * num_edges, num_stages=EDGE_STAGES, disable_licm=True):  # on both sides of the full tiles
        at = tl.where(tile < num_left, tile, tile + num_full) * BLOCK_M
        of_row = group * wide_total + at
        dk, dk_tail, dv, dv_tail = _dkdv_step(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail,
            Q_ptr + group * q_head_stride * STRIDE_UNIT + at * q_row_stride,
            Grad_out_ptr + group * grad_head_stride * STRIDE_UNIT + at * grad_row_stride,
            Lse_ptr + of_row, Delta_ptr + of_row, q_rows, grad_rows,
            at, size, begin, end, inner_scale, outer_scale, H, MAIN, TAIL, BLOCK_M, SOFTCAP, True,
        )  # fmt: skip
        tile += 1
        group += (tile == num_edges).to(tl.int32)
        tile = tl.where(tile == num_edges, 0, tile)
    # Every step is one tile on; a turn to the next head is a jump on top.
    at = num_left * BLOCK_M
    Q_ptr += at * q_row_stride
    Grad_out_ptr += at * grad_row_stride
    of_row = at.to(tl.int64)
    passed = num_full * BLOCK_M
    q_jump = q_head_stride * STRIDE_UNIT - passed * q_row_stride
    grad_jump = grad_head_stride * STRIDE_UNIT - passed * grad_row_stride
    row_jump = wide_total - passed
    group, tile = 0, 0
    for _ in tl.range(groups * num_full, disable_licm=True):
        row = of_row + group * row_jump
        dk, dk_tail, dv, dv_tail = _dkdv_step(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, Q_ptr + group * q_jump, Grad_out_ptr + group * grad_jump,
            Lse_ptr + row, Delta_ptr + row, q_rows, grad_rows,
            0, size, begin, end, inner_scale, outer_scale, H, MAIN, TAIL, BLOCK_M, SOFTCAP, False,
        )  # fmt: skip
        Q_ptr += BLOCK_M * q_row_stride
        Grad_out_ptr += BLOCK_M * grad_row_stride
        of_row += BLOCK_M
        tile += 1
        group += (tile == num_full).to(tl.int32)
        tile = tl.where(tile == num_full, 0, tile)

    stored = keys < k_stop  # keys that seqused_k leaves out get zeros
    offsets = tile_offsets(BLOCK_N, num_kv_heads, H)
    base = (first_key * num_kv_heads.to(tl.int64) + kv_head) * H
    used = valid[:, None]
    store_tile(Grad_k_ptr + base, offsets, stored, tl.where(used, dk * grad_scale, 0.0), H, 0, MAIN)
    store_tile(Grad_v_ptr + base, offsets, stored, tl.where(used, dv, 0.0), H, 0, MAIN)
    if TAIL:
        store_tile(Grad_k_ptr + base, offsets, stored, tl.where(used, dk_tail * grad_scale, 0.0), H, MAIN, TAIL)
        store_tile(Grad_v_ptr + base, offsets, stored, tl.where(used, dv_tail, 0.0), H, MAIN, TAIL)
