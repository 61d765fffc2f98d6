"""Contrastive loss, Triton forward: statistics of every row of x against all of y, no logit stored.

    s_ij = scale * x_i . y_j (+ bias for sigmoid)

infonce, per row: shift = max_j s_ij, total = sum_j exp(s_ij - shift), positive = sum over positives of s_ij - shift,
count = number of positives (`reference/contrastive_blocks.py` says what follows from them). sigmoid, per row:
sum_j log(1 + exp(-z_ij s_ij)), z = +1 for positives and -1 otherwise (Zhai et al. 2023, eq. 1).

A program holds BLOCK_M rows and streams the tiles of one share of y ("split"), as flash attention streams keys: the
maximum moves as it goes and what was summed is rescaled (Dao et al. 2022, algorithm 1). A second stage joins the
splits. Short features are held whole; longer ones are read in blocks for every tile (tables/contrastive_loss.py).
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels.ops.launch import as_rows, on_device, stride_unit
from trichord_kernels.reference.contrastive_blocks import Pairing, empty_statistics
from trichord_kernels.tables.contrastive_loss import forward_tile, num_splits
from trichord_kernels.tables.tile import arch_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_features(
    ptr, rows, num_rows, row_stride, start, STRIDE_UNIT: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):
    """(rows, BLOCK) of the features from column `start` on, 0 behind the last row and behind column E."""
    cols = start + tl.arange(0, BLOCK)
    offsets = rows.to(tl.int64) * row_stride * STRIDE_UNIT
    mask = rows[:, None] < num_rows
    if E % BLOCK != 0:
        mask &= cols[None, :] < E
    return tl.load(ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def products_in_blocks(
    X_ptr,
    Y_ptr,
    rows,
    cols,
    num_rows,
    num_cols,
    X_row_stride,
    Y_row_stride,
    STRIDE_UNIT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 x_i . y_j, read in blocks of E."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, E, BLOCK_E):
        x = load_features(X_ptr, rows, num_rows, X_row_stride, start, STRIDE_UNIT, E, BLOCK_E)
        y = load_features(Y_ptr, cols, num_cols, Y_row_stride, start, STRIDE_UNIT, E, BLOCK_E)
        products = tl.dot(x, tl.trans(y), products, input_precision="ieee")
    return products


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32 precision also where it is tiny: log1p(u) = 2 artanh(u / (2 + u)), as a series."""
    u = tl.exp2(-tl.abs(x) * LOG2E)
    ratio = u / (2.0 + u)  # at most 1/3: the first term left out is below 2e-9 of the sum
    square = ratio * ratio
    series = 1.0 / 15.0
    for term in tl.static_range(13, 0, -2):  # pyright: ignore[reportGeneralTypeIssues]
        series = series * square + 1.0 / term
    return tl.maximum(x, 0.0) + 2.0 * ratio * series


@triton.jit
def _contrastive_forward_kernel(
    X_ptr,
    Y_ptr,
    X_ids_ptr,
    Y_ids_ptr,
    Scale_ptr,
    Bias_ptr,
    Stats_ptr,
    X_row_stride,
    Y_row_stride,
    num_rows,
    num_cols,
    cols_per_split,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Statistics of BLOCK_M rows over one split of the candidates: (splits, R, 4) float32, shift and positive in
    units of log 2; sigmoid: loss, 0, 0, 0."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ids = tl.load(X_ids_ptr + rows, mask=rows < num_rows, other=-3)
    scale = tl.load(Scale_ptr).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(Bias_ptr).to(tl.float32)
    if not SIGMOID:
        scale *= LOG2E
    if RESIDENT:
        x = load_features(X_ptr, rows, num_rows, X_row_stride, 0, STRIDE_UNIT, E, BLOCK_E)
    shift = tl.full((BLOCK_M,), -1e30, tl.float32)  # LOWEST
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * cols_per_split
    for start in tl.range(first, tl.minimum(first + cols_per_split, num_cols), BLOCK_N, num_stages=NUM_STAGES):  # pyright: ignore
        cols = start + tl.arange(0, BLOCK_N)
        y_ids = tl.load(Y_ids_ptr + cols, mask=cols < num_cols, other=-4)
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
        # -inf where the candidate is no slot in use: it adds 0 to every sum, for sigmoid, too
        logits = products * scale + tl.where(y_ids >= 0, bias, float("-inf"))[None, :]
        is_positive = x_ids[:, None] == y_ids[None, :]
        if SIGMOID:
            total += tl.sum(_softplus(tl.where(is_positive, -logits, logits)), axis=1)
        else:
            new_shift = tl.maximum(shift, tl.max(logits, axis=1))
            moved = shift - new_shift
            shifted = logits - new_shift[:, None]
            total = total * tl.exp2(moved) + tl.sum(tl.exp2(shifted), axis=1)
            # Both sums in one: a sum of `is_positive` alone would get a layout of its own, and a transpose.
            both = tl.join(tl.where(is_positive, shifted, 0.0), tl.where(is_positive, 1.0, 0.0))
            new_positive, new_count = tl.split(tl.sum(both, axis=1))
            positive += count * moved + new_positive
            count += new_count
            shift = new_shift
    if SIGMOID:
        total = tl.where(x_ids >= 0, total, 0.0)
        shift = total
    # One 128-bit store per row
    at = (tl.program_id(1).to(tl.int64) * num_rows + rows) * 4
    stats = tl.reshape(tl.join(tl.join(shift, positive), tl.join(total, count)), (BLOCK_M, 4))
    tl.store(Stats_ptr + at[:, None] + tl.arange(0, 4)[None, :], stats, mask=rows[:, None] < num_rows)


def row_statistics(pairing: Pairing) -> Tensor:
    """(4, R) or, for sigmoid, (1, R) float32: `reference.contrastive_blocks.statistics` of the rows, on the device."""
    p = pairing
    if p.is_empty():
        return empty_statistics(p.x, p.kind)
    tile = forward_tile(arch_of(p.x.device), p.x.dtype, p.x.shape[1])
    x, y = as_rows(p.x), as_rows(p.y)
    unit = stride_unit(x, y)
    row_blocks = triton.cdiv(x.shape[0], tile.block_m)
    splits, cols_per_split = num_splits(row_blocks, y.shape[0], tile.block_n)
    stats = x.new_empty((splits, x.shape[0], 4), dtype=torch.float32)
    with on_device("contrastive_loss", _contrastive_forward_kernel, x):
        _contrastive_forward_kernel[(row_blocks, splits)](
            x,
            y,
            p.x_ids,
            p.y_ids,
            p.scale,
            p.bias if p.kind == "sigmoid" else None,
            stats,
            x.stride(0) // unit,
            y.stride(0) // unit,
            x.shape[0],
            y.shape[0],
            cols_per_split,
            E=x.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_E=tile.block_e,
            STRIDE_UNIT=unit,
            NUM_STAGES=tile.num_stages,
            RESIDENT=tile.is_resident,
            SIGMOID=p.kind == "sigmoid",
            HAS_BIAS=p.kind == "sigmoid" and p.bias is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return stats[:, :, 0].sum(dim=0)[None] if p.kind == "sigmoid" else _join_splits(stats.permute(0, 2, 1))


def _join_splits(parts: Tensor) -> Tensor:
    """(splits, 4, R) -> (4, R), as `contrastive_blocks.merge_statistics`, which calls for natural units.

    `positive` is brought to natural units, `shift` stays in units of log 2: it only comes back to the kernel, and there
    must be the very number that the totals are relative to.
    """
    shift = parts[:, 0].amax(dim=0)
    moved = parts[:, 0] - shift
    total = (parts[:, 1] * moved.exp2()).sum(dim=0)
    positive = (parts[:, 2] + parts[:, 3] * moved).sum(dim=0) * math.log(2)
    return torch.stack([shift, total, positive, parts[:, 3].sum(dim=0)])
