"""A small causal attention for the static judge's tests: a full-tile loop, a masked one, and ways to spoil it."""

# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from trichord_kernels.static.case import StaticCase


@triton.jit
def _visit(
    q,
    total,
    peak,
    mixed,
    K_ptr,
    V_ptr,
    first,
    last,
    query_rows,
    row_stride,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    cols = tl.arange(0, q.shape[1])
    for start in range(first, last, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        k = tl.load(K_ptr + key_rows[:, None].to(tl.int64) * row_stride + cols[None, :])
        scores = tl.dot(q, k.T)
        if HAS_MASK:
            scores = tl.where(key_rows[None, :] <= query_rows[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak, total = new_peak, total * shrink + tl.sum(weights, axis=1)
        v = tl.load(V_ptr + key_rows[:, None].to(tl.int64) * row_stride + cols[None, :])
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None])
    return total, peak, mixed


@triton.jit
def judged_attention(
    Q_ptr,
    K_ptr,
    V_ptr,
    Out_ptr,
    row_stride,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_ALL: tl.constexpr,
):
    query_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = query_rows[:, None].to(tl.int64) * row_stride + tl.arange(0, H)[None, :]
    q = tl.load(Q_ptr + offsets)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mixed = tl.zeros((BLOCK_M, H), tl.float32)
    edge = tl.program_id(0) * BLOCK_M
    total, peak, mixed = _visit(q, total, peak, mixed, K_ptr, V_ptr, 0, edge, query_rows, row_stride, BLOCK_N, MASK_ALL)
    total, peak, mixed = _visit(
        q, total, peak, mixed, K_ptr, V_ptr, edge, edge + BLOCK_M, query_rows, row_stride, BLOCK_N, True
    )
    tl.store(Out_ptr + offsets, (mixed / total[:, None]).to(q.dtype))


def attention_case(
    name: str = "judged_attention.64", block_m: int = 128, num_warps: int = 4, mask_all: bool = False, **changes
) -> StaticCase:
    """Head dim 64 in bf16, keys in tiles of 64, three stages: the shape of the tutorial's `fwd.d64` baseline."""
    constexprs = {"H": 64, "BLOCK_M": block_m, "BLOCK_N": 64, "MASK_ALL": mask_all}
    names = judged_attention.arg_names
    fields = {
        "name": name,
        "kernel": judged_attention,
        "signature": {n: "constexpr" if n in constexprs else "*bf16" if n.endswith("_ptr") else "i32" for n in names},
        "constexprs": constexprs,
        "num_warps": num_warps,
        "num_stages": 3,
        "row_bytes": None,
        "shared_bytes": 0,
        "is_forward": True,
        "matmul": True,
        "head_dim": 64,
        "flops_per_iteration": 2 * 2 * block_m * 64 * 64,
        "attrs": {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constexprs},
    }
    return StaticCase(**(fields | changes))
