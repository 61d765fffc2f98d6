"""Contrastive loss, Triton backward: the gradient of one side, each tile of logits computed again, none stored.

With s_ij as in the forward and `part` = (shift, a, b) of the rows (x) and of the columns (y), see `part_of`:

    g_ij = exp(s_ij - shift_i) a_i + exp(s_ij - shift_j) a_j - [positive] (b_i + b_j)      infonce
    g_ij = (sigmoid(s_ij) - [positive]) (a_i or a_j)                                       sigmoid
    dx_i = scale * sum_j g_ij y_j,  d_scale = sum_ij g_ij x_i . y_j,  d_bias = sum_ij g_ij

One tile serves both directions of the symmetric loss. The same kernel gives d_queries (rows are queries) and d_targets
(rows are targets), with the roles exchanged. A program owns BLOCK_M rows x BLOCK_OUT features of dx for one split of
the candidates; splits, and the programs' shares of d_scale and d_bias, are added by a second stage. No atomics.
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels.ops.contrastive_loss_forward import LOG2E, load_features, products_in_blocks
from trichord_kernels.ops.launch import as_rows, on_device, stride_unit
from trichord_kernels.reference.contrastive_blocks import Pairing, SideGradients
from trichord_kernels.tables.contrastive_loss import backward_tile, num_splits
from trichord_kernels.tables.tile import arch_of

# g goes into its product in the features' dtype. In float16 it would underflow at 6e-8: it is at most 2 in size and is
# scaled up by so much meanwhile.
HALF_SCALE = 4096.0


@triton.jit
def _logit_gradient(
    logits,
    is_positive,
    x_shift,
    x_a,
    x_b,
    y_shift,
    y_a,
    y_b,
    SIGMOID: tl.constexpr,
    HAS_X_PART: tl.constexpr,
    HAS_Y_PART: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 g_ij; logits in units of log 2, for sigmoid natural. A logit of -inf gives 0."""
    if SIGMOID:
        # sigmoid(s) of a negative, -sigmoid(-s) of a positive: each from exp(-|s|), so that no difference cancels
        toward = tl.where(is_positive, -logits, logits)
        u = tl.exp2(-tl.abs(logits) * LOG2E)
        size = tl.where(toward >= 0, 1.0, u) / (1.0 + u)
        grad = tl.where(is_positive, -size, size)
        return grad * x_a[:, None] if HAS_X_PART else grad * y_a[None, :]
    if HAS_X_PART and HAS_Y_PART:
        grad = tl.exp2(logits - x_shift[:, None]) * x_a[:, None] + tl.exp2(logits - y_shift[None, :]) * y_a[None, :]
        over_count = x_b[:, None] + y_b[None, :]
    elif HAS_X_PART:
        grad = tl.exp2(logits - x_shift[:, None]) * x_a[:, None]
        over_count = x_b[:, None]
    else:
        grad = tl.exp2(logits - y_shift[None, :]) * y_a[None, :]
        over_count = y_b[None, :]
    return tl.where(is_positive, grad - over_count, grad)


@triton.jit
def _load_facts(ptr, at, length):
    """shift, a, b (float32) and id (int32) of slots of a packed (length, 4), 0 and id -4 behind the end.

    Packed so that a slot is one 128-bit load; as integers, because moving a float may change the bits of a NaN.
    """
    inside = at < length
    offsets = at.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    packed = tl.load(ptr + offsets, mask=inside[:, None], other=0)
    even, odd = tl.split(tl.reshape(packed, (at.shape[0], 2, 2)))
    shift, b = tl.split(even)
    a, ids = tl.split(odd)
    shift, a, b = shift.to(tl.float32, bitcast=True), a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    return shift, a, b, tl.where(inside, ids, -4)


@triton.jit
def _contrastive_backward_kernel(
    X_ptr,
    Y_ptr,
    X_facts_ptr,
    Y_facts_ptr,
    Scale_ptr,
    Bias_ptr,
    Grad_x_ptr,
    Scalars_ptr,
    X_row_stride,
    Y_row_stride,
    num_rows,
    num_cols,
    cols_per_split,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    RESIDENT: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_PART: tl.constexpr,
    HAS_Y_PART: tl.constexpr,
    WANT_SCALARS: tl.constexpr,
):
    """sum_j g_ij y_j over one split, (splits, R, E) in whole tiles; sums of g x.y and of g, (2, splits, row blocks)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_shift, x_a, x_b, x_ids = _load_facts(X_facts_ptr, rows, num_rows)
    scale = tl.load(Scale_ptr).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(Bias_ptr).to(tl.float32)
    if not SIGMOID:
        scale *= LOG2E
    if RESIDENT:
        x = load_features(X_ptr, rows, num_rows, X_row_stride, 0, STRIDE_UNIT, E, BLOCK_E)
    grad_x = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    by_scale = tl.zeros((BLOCK_M,), tl.float32)
    by_bias = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * cols_per_split
    for start in range(first, tl.minimum(first + cols_per_split, num_cols), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y_shift, y_a, y_b, y_ids = _load_facts(Y_facts_ptr, cols, num_cols)
        if RESIDENT:
            y = load_features(Y_ptr, cols, num_cols, Y_row_stride, 0, STRIDE_UNIT, E, BLOCK_E)
            products = tl.dot(x, tl.trans(y), input_precision="ieee")
        else:
            products = products_in_blocks(
                X_ptr,
                Y_ptr,
                rows,
                cols,
                num_rows,
                num_cols,
                X_row_stride,
                Y_row_stride,
                STRIDE_UNIT,
                E,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
            )
            y = load_features(
                Y_ptr, cols, num_cols, Y_row_stride, tl.program_id(2) * BLOCK_OUT, STRIDE_UNIT, E, BLOCK_OUT
            )
        # -inf where a slot is not in use. Only the columns' part would give such a row a gradient.
        logits = products * scale + tl.where(y_ids >= 0, bias, float("-inf"))[None, :]
        if HAS_Y_PART:
            logits += tl.where(x_ids >= 0, 0.0, float("-inf"))[:, None]
        is_positive = x_ids[:, None] == y_ids[None, :]
        grad = _logit_gradient(
            logits, is_positive, x_shift, x_a, x_b, y_shift, y_a, y_b, SIGMOID, HAS_X_PART, HAS_Y_PART
        )
        if WANT_SCALARS:
            by_scale += tl.sum(grad * products, axis=1)
            if HAS_BIAS:
                by_bias += tl.sum(grad, axis=1)
        grad_x = tl.dot(grad.to(y.dtype), y, grad_x, input_precision="ieee")
    # Grad_x is padded to whole tiles: masks here cost registers that the loop needs.
    tile = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M
    out_rows = tile + tl.arange(0, BLOCK_M)
    out_cols = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    tl.store(Grad_x_ptr + out_rows[:, None] * (tl.num_programs(2) * BLOCK_OUT) + out_cols[None, :], grad_x)
    if WANT_SCALARS and tl.program_id(2) == 0:
        at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(Scalars_ptr + at, tl.sum(by_scale, axis=0))
        tl.store(Scalars_ptr + tl.num_programs(0) * tl.num_programs(1) + at, tl.sum(by_bias, axis=0))


def row_gradients(
    pairing: Pairing, x_part: Tensor | None, y_part: Tensor | None, want_scalars: bool = True
) -> SideGradients:
    """Gradients by x (float32) and, if wanted, by the scalars, of the losses of rows (`x_part`) and columns (`y_part`).

    Without `want_scalars` scale and bias are 0: one of the two sides gives them, since both meet every pair.
    """
    p = pairing
    zero = p.x.new_zeros((), dtype=torch.float32)
    if p.is_empty():
        return SideGradients(torch.zeros_like(p.x, dtype=torch.float32), None, zero, zero)
    up = HALF_SCALE if p.x.dtype == torch.float16 else 1.0
    facts = _facts(x_part, p.x_ids, up), _facts(y_part, p.y_ids, up)
    grad_x, scalars = _launch(p, *facts, x_part is not None, y_part is not None, want_scalars)
    dx = grad_x.sum(dim=0).mul_(p.scale.float() / up)
    d_scale, d_bias = scalars.sum(dim=(1, 2)) / up if want_scalars else (zero, zero)
    return SideGradients(dx, None, d_scale, d_bias)


def _facts(part: Tensor | None, ids: Tensor, up: float) -> Tensor:
    """(n, 4) int32: the bits of shift, up * a, up * b of every slot (0 without a part and for unused ones), its id."""
    if part is None:
        part = ids.new_zeros(3, ids.shape[0], dtype=torch.float32)
    shift, a, b = part
    used = ids >= 0
    floats = torch.stack([shift, (a * up).where(used, 0), (b * up).where(used, 0)])
    return torch.cat([floats.view(torch.int32), ids[None]]).T.contiguous()


def _launch(
    p: Pairing, x_facts: Tensor, y_facts: Tensor, has_x_part: bool, has_y_part: bool, want_scalars: bool
) -> tuple[Tensor, Tensor]:
    """(splits, R, E) unscaled gradient and (2, splits, row blocks) shares of d_scale and d_bias, float32."""
    tile = backward_tile(arch_of(p.x.device), p.x.dtype, p.x.shape[1])
    x, y = as_rows(p.x), as_rows(p.y)
    unit = stride_unit(x, y)
    row_blocks, chunks = triton.cdiv(x.shape[0], tile.block_m), triton.cdiv(x.shape[1], tile.block_out)
    splits, cols_per_split = num_splits(row_blocks * chunks, y.shape[0], tile.block_n)
    padded = (splits, row_blocks * tile.block_m, chunks * tile.block_out)
    grad_x = x.new_empty(padded, dtype=torch.float32)
    scalars = x.new_empty((2, splits, row_blocks) if want_scalars else (0,), dtype=torch.float32)
    with on_device("contrastive_loss", _contrastive_backward_kernel, x):
        _contrastive_backward_kernel[(row_blocks, splits, chunks)](
            x,
            y,
            x_facts,
            y_facts,
            p.scale,
            p.bias if p.kind == "sigmoid" else None,
            grad_x,
            scalars,
            x.stride(0) // unit,
            y.stride(0) // unit,
            x.shape[0],
            y.shape[0],
            cols_per_split,
            E=x.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_E=tile.block_e,
            BLOCK_OUT=tile.block_out,
            STRIDE_UNIT=unit,
            RESIDENT=tile.is_resident,
            SIGMOID=p.kind == "sigmoid",
            HAS_BIAS=p.kind == "sigmoid" and p.bias is not None,
            HAS_X_PART=has_x_part,
            HAS_Y_PART=has_y_part,
            WANT_SCALARS=want_scalars,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return grad_x[:, : x.shape[0], : x.shape[1]], scalars
