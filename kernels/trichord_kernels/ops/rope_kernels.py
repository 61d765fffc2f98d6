"""RoPE's Triton kernels, forward and backward; `ops/rope.py` launches them.

A program owns a few tokens. It computes their cosines and sines once, holds them in registers, and walks over the
heads of q and then of k, `HEADS` at a time. A row of its tile is one head of one token; it is held as two tiles of
pairs, the elements that turn together, so that both are read in whole 128-bit accesses.
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# pi / 2 = A + B + C + D. A, B and C have 8 bits each, so that their products with the number of quarter turns (below
# 2^16 of them) are exact in float32 even without a fused multiply-add.
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI_A = tl.constexpr(1.5703125)
HALF_PI_B = tl.constexpr(0.0004825592041015625)
HALF_PI_C = tl.constexpr(1.2665987014770508e-06)
HALF_PI_D = tl.constexpr(9.92093629470503e-10)


@triton.jit
def _cos_and_sin(angle):
    """cos and sin of a float32 angle to 2^-23 for |angle| below 10^6 (10^5 without fused multiply-adds).

    Written out because the libraries' cos and sin (libdevice, OCML) each reduce the angle anew and branch to a slow
    path, on NVIDIA with an array in local memory, as soon as one angle of a warp is large, which positions are.
    Taylor's series on a quarter turn: the first terms left out are below 2^-28.
    """
    quarters = tl.floor(tl.fma(angle, TWO_OVER_PI, 0.5))
    r = tl.fma(-quarters, HALF_PI_A, angle)
    r = tl.fma(-quarters, HALF_PI_B, r)
    r = tl.fma(-quarters, HALF_PI_C, r)
    r = tl.fma(-quarters, HALF_PI_D, r)  # |r| <= pi / 4
    r2 = r * r
    sin_tail = tl.fma(tl.fma(tl.fma(r2, 1 / 362880, -1 / 5040), r2, 1 / 120), r2, -1 / 6)
    sin = tl.fma(r * r2, sin_tail, r)
    cos_tail = tl.fma(tl.fma(tl.fma(r2, -1 / 3628800, 1 / 40320), r2, -1 / 720), r2, 1 / 24)
    cos = tl.fma(r2, tl.fma(r2, cos_tail, -0.5), 1.0)
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    turned_cos = tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quadrant >= 2, -turned_sin, turned_sin)


@triton.jit
def _turning_of(
    Position_ptr,
    Inv_freq_ptr,
    axis_stride,
    token_stride,
    tokens,
    in_range,
    scaling,
    dtype: tl.constexpr,
    H: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    DEAL: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """cos and sin (rows, BLOCK_PAIRS), float32 with the rounding of `dtype`; 1 and 0 where the pair passes through.

    DEAL holds groups of four, see `ops/rope.py: deal_axes`: columns `first + turn + i * period` read `axis`.
    """
    cols = tl.arange(0, BLOCK_PAIRS)[None, :]
    inv_freq = tl.load(Inv_freq_ptr + cols, mask=cols < FREQUENCIES, other=0.0)
    position = tl.zeros_like(in_range.to(tl.float32)) + tl.zeros_like(inv_freq)
    for i in tl.static_range(0, len(DEAL), 4):  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        at = tokens * token_stride + tl.cast(axis_stride, tl.int64) * DEAL[i + 3]
        on_axis = tl.load(Position_ptr + at, mask=in_range, other=0).to(tl.float32)
        is_its_turn = (cols >= DEAL[i]) & ((cols - DEAL[i]) % DEAL[i + 1] == DEAL[i + 2])
        position = tl.where(is_its_turn, on_axis, position)
    cos, sin = _cos_and_sin(position * inv_freq)
    cos, sin = (cos * scaling).to(dtype).to(tl.float32), (sin * scaling).to(dtype).to(tl.float32)
    if 2 * FREQUENCIES < H:
        cos, sin = tl.where(cols < FREQUENCIES, cos, 1.0), tl.where(cols < FREQUENCIES, sin, 0.0)
    return cos, sin


@triton.jit
def _pair_offsets(H: tl.constexpr, FREQUENCIES: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """Where the two elements of each pair lie in a head, and which columns are pairs, all (1, BLOCK_PAIRS).

    With F frequencies: j and F + j for j < F; what passes through is paired by halves, too: F + j and H/2 + j.
    """
    cols = tl.arange(0, BLOCK_PAIRS)[None, :]
    low, high = cols, cols + FREQUENCIES
    if 2 * FREQUENCIES < H:
        low, high = tl.where(cols < FREQUENCIES, low, high), tl.where(cols < FREQUENCIES, high, cols + H // 2)
    return low, high, cols < H // 2


@triton.jit
def _forward_heads(
    X_ptr,
    W_ptr,
    Out_ptr,
    X_token_stride,
    X_head_stride,
    num_heads,
    tokens,
    lanes,
    in_range,
    cos,
    sin,
    eps,
    H: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Norm and turn every head of x for the program's tokens; `lanes` is the head of a row within a step."""
    low_at, high_at, is_pair = _pair_offsets(H, FREQUENCIES, BLOCK_PAIRS)
    mask = in_range & is_pair
    dtype: tl.constexpr = X_ptr.dtype.element_ty
    if HAS_WEIGHT:
        w_low = tl.load(W_ptr + low_at, mask=is_pair, other=0.0).to(tl.float32)
        w_high = tl.load(W_ptr + high_at, mask=is_pair, other=0.0).to(tl.float32)
    for first in range(0, num_heads, HEADS):
        heads = first + lanes
        x_at = tokens * X_token_stride * STRIDE_UNIT + heads * X_head_stride * STRIDE_UNIT
        low = tl.load(X_ptr + x_at + low_at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(X_ptr + x_at + high_at, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:  # rounded where Llama's norm rounds
            rstd = tl.rsqrt(tl.sum(low * low + high * high, axis=1, keep_dims=True) / H + eps)
            low = ((low * rstd).to(dtype).to(tl.float32) * w_low).to(dtype).to(tl.float32)
            high = ((high * rstd).to(dtype).to(tl.float32) * w_high).to(dtype).to(tl.float32)
        out_at = (tokens * num_heads + heads) * H
        tl.store(Out_ptr + out_at + low_at, (low * cos - high * sin).to(dtype), mask=mask)
        tl.store(Out_ptr + out_at + high_at, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit
def _backward_heads(
    Grad_out_ptr,
    X_ptr,
    W_ptr,
    Grad_x_ptr,
    Grad_w_partial_ptr,
    Grad_out_token_stride,
    Grad_out_head_stride,
    X_token_stride,
    X_head_stride,
    num_heads,
    tokens,
    lanes,
    in_range,
    cos,
    sin,
    eps,
    H: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD_WEIGHT: tl.constexpr,
):
    """Turn the gradient back and pass it through the norm; this program's share of d_weight as one float32 row."""
    low_at, high_at, is_pair = _pair_offsets(H, FREQUENCIES, BLOCK_PAIRS)
    mask = in_range & is_pair
    dtype: tl.constexpr = Grad_out_ptr.dtype.element_ty
    if HAS_WEIGHT:
        w_low = tl.load(W_ptr + low_at, mask=is_pair, other=0.0).to(tl.float32)
        w_high = tl.load(W_ptr + high_at, mask=is_pair, other=0.0).to(tl.float32)
    if HAS_GRAD_WEIGHT:
        sum_low = tl.zeros((BLOCK_ROWS, BLOCK_PAIRS), tl.float32)
        sum_high = tl.zeros((BLOCK_ROWS, BLOCK_PAIRS), tl.float32)
    for first in range(0, num_heads, HEADS):
        heads = first + lanes
        grad_at = tokens * Grad_out_token_stride * STRIDE_UNIT + heads * Grad_out_head_stride * STRIDE_UNIT
        low = tl.load(Grad_out_ptr + grad_at + low_at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(Grad_out_ptr + grad_at + high_at, mask=mask, other=0.0).to(tl.float32)
        grad_low, grad_high = low * cos + high * sin, high * cos - low * sin
        if HAS_WEIGHT:
            x_at = tokens * X_token_stride * STRIDE_UNIT + heads * X_head_stride * STRIDE_UNIT
            low = tl.load(X_ptr + x_at + low_at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(X_ptr + x_at + high_at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(low * low + high * high, axis=1, keep_dims=True) / H + eps)
            low, high = low * rstd, high * rstd
            if HAS_GRAD_WEIGHT:
                sum_low += grad_low * low.to(dtype).to(tl.float32)
                sum_high += grad_high * high.to(dtype).to(tl.float32)
            grad_low, grad_high = grad_low * w_low, grad_high * w_high
            mean = tl.sum(grad_low * low + grad_high * high, axis=1, keep_dims=True) / H
            grad_low, grad_high = rstd * (grad_low - low * mean), rstd * (grad_high - high * mean)
        out_at = (tokens * num_heads + heads) * H
        tl.store(Grad_x_ptr + out_at + low_at, grad_low.to(dtype), mask=mask)
        tl.store(Grad_x_ptr + out_at + high_at, grad_high.to(dtype), mask=mask)
    if HAS_GRAD_WEIGHT:
        partial_at = Grad_w_partial_ptr + tl.program_id(0).to(tl.int64) * H
        tl.store(partial_at + low_at, tl.sum(sum_low, axis=0, keep_dims=True), mask=is_pair)
        tl.store(partial_at + high_at, tl.sum(sum_high, axis=0, keep_dims=True), mask=is_pair)


@triton.jit
def _rope_forward_kernel(
    Q_ptr,
    K_ptr,
    Position_ptr,
    Inv_freq_ptr,
    Q_weight_ptr,
    K_weight_ptr,
    Q_out_ptr,
    K_out_ptr,
    Q_token_stride,
    Q_head_stride,
    K_token_stride,
    K_head_stride,
    Position_axis_stride,
    Position_token_stride,
    num_tokens,
    num_q_heads,
    num_k_heads,
    eps,
    scaling,
    H: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    DEAL: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
):
    """q and k turned for BLOCK_ROWS / HEADS tokens; the outputs are contiguous."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    tokens = tl.program_id(0).to(tl.int64) * (BLOCK_ROWS // HEADS) + rows // HEADS
    lanes = (rows % HEADS).to(tl.int64)
    in_range = tokens < num_tokens
    cos, sin = _turning_of(
        Position_ptr,
        Inv_freq_ptr,
        Position_axis_stride,
        Position_token_stride,
        tokens,
        in_range,
        scaling,
        Q_ptr.dtype.element_ty,
        H,
        FREQUENCIES,
        DEAL,
        BLOCK_PAIRS,
    )
    _forward_heads(
        Q_ptr,
        Q_weight_ptr,
        Q_out_ptr,
        Q_token_stride,
        Q_head_stride,
        num_q_heads,
        tokens,
        lanes,
        in_range,
        cos,
        sin,
        eps,
        H,
        FREQUENCIES,
        HEADS,
        BLOCK_PAIRS,
        STRIDE_UNIT,
        HAS_Q_WEIGHT,
    )
    _forward_heads(
        K_ptr,
        K_weight_ptr,
        K_out_ptr,
        K_token_stride,
        K_head_stride,
        num_k_heads,
        tokens,
        lanes,
        in_range,
        cos,
        sin,
        eps,
        H,
        FREQUENCIES,
        HEADS,
        BLOCK_PAIRS,
        STRIDE_UNIT,
        HAS_K_WEIGHT,
    )


@triton.jit
def _rope_backward_kernel(
    Grad_q_out_ptr,
    Grad_k_out_ptr,
    Q_ptr,
    K_ptr,
    Position_ptr,
    Inv_freq_ptr,
    Q_weight_ptr,
    K_weight_ptr,
    Grad_q_ptr,
    Grad_k_ptr,
    Grad_q_weight_partial_ptr,
    Grad_k_weight_partial_ptr,
    Grad_q_out_token_stride,
    Grad_q_out_head_stride,
    Grad_k_out_token_stride,
    Grad_k_out_head_stride,
    Q_token_stride,
    Q_head_stride,
    K_token_stride,
    K_head_stride,
    Position_axis_stride,
    Position_token_stride,
    num_tokens,
    num_q_heads,
    num_k_heads,
    eps,
    scaling,
    H: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    DEAL: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    HAS_GRAD_Q_WEIGHT: tl.constexpr,
    HAS_GRAD_K_WEIGHT: tl.constexpr,
):
    """dq and dk for BLOCK_ROWS / HEADS tokens, contiguous, and this program's share of the weights' gradients."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    tokens = tl.program_id(0).to(tl.int64) * (BLOCK_ROWS // HEADS) + rows // HEADS
    lanes = (rows % HEADS).to(tl.int64)
    in_range = tokens < num_tokens
    cos, sin = _turning_of(
        Position_ptr,
        Inv_freq_ptr,
        Position_axis_stride,
        Position_token_stride,
        tokens,
        in_range,
        scaling,
        Grad_q_out_ptr.dtype.element_ty,
        H,
        FREQUENCIES,
        DEAL,
        BLOCK_PAIRS,
    )
    _backward_heads(
        Grad_q_out_ptr,
        Q_ptr,
        Q_weight_ptr,
        Grad_q_ptr,
        Grad_q_weight_partial_ptr,
        Grad_q_out_token_stride,
        Grad_q_out_head_stride,
        Q_token_stride,
        Q_head_stride,
        num_q_heads,
        tokens,
        lanes,
        in_range,
        cos,
        sin,
        eps,
        H,
        FREQUENCIES,
        HEADS,
        BLOCK_ROWS,
        BLOCK_PAIRS,
        STRIDE_UNIT,
        HAS_Q_WEIGHT,
        HAS_GRAD_Q_WEIGHT,
    )
    _backward_heads(
        Grad_k_out_ptr,
        K_ptr,
        K_weight_ptr,
        Grad_k_ptr,
        Grad_k_weight_partial_ptr,
        Grad_k_out_token_stride,
        Grad_k_out_head_stride,
        K_token_stride,
        K_head_stride,
        num_k_heads,
        tokens,
        lanes,
        in_range,
        cos,
        sin,
        eps,
        H,
        FREQUENCIES,
        HEADS,
        BLOCK_ROWS,
        BLOCK_PAIRS,
        STRIDE_UNIT,
        HAS_K_WEIGHT,
        HAS_GRAD_K_WEIGHT,
    )
