"""Backward of fuse_modalities: every row operand read once, weight gradients in two stages, no atomics.

With g = d_out * norm_weight and n = the normalised h, all float32:

    d_z       = rstd * (g - n * mean(g * n) [- mean(g) for layer]) + d_h     d_z = d_out without a norm
    d_x_i     = c_i * d_z            (c_i: weight, gate, presence)
    s_i       = sum over D of x_i * d_z
    d_gate    = softmax's:  d_logit_i = gate_i * (s_i - sum_j gate_j * s_j)
    d_w_i     = sum over rows (and D for a scalar) of presence_i * x_i * d_z
    d_norm_weight = sum over rows of d_out * n,  d_norm_bias = sum over rows of d_out

Without a residual h was not stored: it is mixed again from the inputs, which the pass reads anyway.
Sums over rows: each program adds its rows in float32 registers and writes one row per weight; torch adds those. Where
the weights' sums would not fit the registers, a second kernel makes them from the stored d_z, by blocks of columns.
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# Neither does it type tl.static_range as something to loop over, and its tuples grow by `+` only.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels.ops.fuse_modalities_forward import (
    NORM_CODES,
    Mix,
    load_columns,
    load_input,
    load_scalars,
    normalize,
    row_factors,
    row_stride,
    times_weight,
)
from trichord_kernels.ops.launch import as_rows, on_device, stride_unit
from trichord_kernels.tables.fuse_modalities import row_tile, sums_fit_registers, weights_tile
from trichord_kernels.tables.tile import arch_of

# Programs of the backward, each with its own float32 row per weight. A function of nothing but the row count, so that
# the sum has the same order on every GPU; 256 are 2 per SM on an H100.
MAX_PARTIAL_SUMS = 256


@triton.jit
def store_gate_gradient(
    Grad_table_ptr,
    factors,
    dots,
    rows,
    num_rows,
    N: tl.constexpr,
    TABLE_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
):
    """d_logit_i = gate_i * (s_i - sum_j gate_j * s_j) from dots s_i (BLOCK_ROWS, 1); padding gets 0.

    The tile is so wide that a thread holds four entries: a store of 128 bits, by the one or two threads it takes.
    """
    mean = tl.zeros_like(dots[0])
    for i in tl.static_range(N):
        mean += factors[i] * dots[i]
    entries = tl.arange(0, BLOCK_TABLE)[None, :]
    grad_table = tl.zeros((BLOCK_ROWS, BLOCK_TABLE), tl.float32)
    for i in tl.static_range(N):
        grad_table = tl.where(entries == i, factors[i] * (dots[i] - mean), grad_table)
    mask = (rows < num_rows) & (entries < TABLE_N)
    tl.store(Grad_table_ptr + rows * TABLE_N + entries, grad_table, mask=mask)


@triton.jit
def _fuse_modalities_backward_kernel(
    Grad_ptr,
    Grad_h_ptr,
    H_ptr,
    X_ptrs,
    W_ptrs,
    Scalars_ptr,
    Table_ptr,
    Attended_ptr,
    Norm_w_ptr,
    Grad_x_ptrs,
    Grad_z_ptr,
    Grad_table_ptr,
    Partial_ptr,
    Grad_row_stride,
    Grad_h_row_stride,
    H_row_stride,
    X_row_strides,
    Attended_row_stride,
    num_rows,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    TABLE_N: tl.constexpr,
    MIX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALARS: tl.constexpr,
    CHANNEL_BITS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_ATTENDED: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    GRAD_X_BITS: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    GRAD_TABLE: tl.constexpr,
    GRAD_Z: tl.constexpr,
    GRAD_NORM: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
):
    """All gradients of every num_programs-th tile of rows, and this program's share of the weights' sums."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    in_row = cols < D
    sums, scalars = (), ()
    for _ in tl.static_range(GRAD_WEIGHTS * N + GRAD_NORM + GRAD_BIAS):
        sums = sums + (tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32),)
    if HAS_SCALARS:
        scalars = load_scalars(Scalars_ptr, TABLE_N)
    step = tl.num_programs(0) * BLOCK_ROWS
    for start in range(tl.program_id(0) * BLOCK_ROWS, num_rows, step):
        numbers = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)
        rows = numbers[:, None]
        mask = (rows < num_rows) & in_row
        factors = ()
        if MIX != 0:
            factors = row_factors(Table_ptr, numbers, num_rows, TABLE_N, MIX)
        grad = tl.load(Grad_ptr + rows * Grad_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0).to(tl.float32)
        grad_z = grad
        xs, new_sums, dots = (), (), ()
        if NORM != 0:
            if HAS_H:
                h = tl.load(H_ptr + rows * H_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
            else:
                z = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
                if HAS_ATTENDED:
                    offsets = rows * Attended_row_stride * STRIDE_UNIT + cols
                    z += tl.load(Attended_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                for i in tl.static_range(N):
                    offsets = rows * X_row_strides[i] * STRIDE_UNIT + cols
                    xs = xs + (load_input(X_ptrs[i], offsets, mask, factors, i, MIX),)
                    x = xs[i].to(tl.float32)
                    if MIX != 0:
                        x *= factors[i]
                    z += times_weight(x, W_ptrs, scalars, cols, i, D, HAS_WEIGHTS, CHANNEL_BITS)
                h = z.to(Grad_ptr.dtype.element_ty)
            normed, rstd = normalize(h.to(tl.float32), in_row, eps, D, NORM)
            grad_normed = grad * load_columns(Norm_w_ptr, cols, D)
            grad_z = grad_normed - normed * (tl.sum(grad_normed * normed, axis=1, keep_dims=True) / D)
            if NORM == 2:
                grad_z -= tl.sum(grad_normed, axis=1, keep_dims=True) / D
            grad_z *= rstd
            if HAS_GRAD_H:
                offsets = rows * Grad_h_row_stride * STRIDE_UNIT + cols
                grad_z += tl.load(Grad_h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if NORM == 1:
                normed = normed.to(h.dtype).to(tl.float32)  # as the forward multiplied it
            if GRAD_NORM:
                new_sums = new_sums + (sums[0] + grad * normed,)
            if GRAD_BIAS:
                new_sums = new_sums + (sums[1] + grad,)
        if GRAD_Z:
            tl.store(Grad_z_ptr + rows * D + cols, grad_z.to(Grad_z_ptr.dtype.element_ty), mask=mask)
        for i in tl.static_range(N):
            if GRAD_WEIGHTS or GRAD_TABLE:
                if NORM != 0 and not HAS_H:
                    x = xs[i]
                else:
                    offsets = rows * X_row_strides[i] * STRIDE_UNIT + cols
                    x = load_input(X_ptrs[i], offsets, mask, factors, i, MIX)
                x_grad = x.to(tl.float32) * grad_z
                if GRAD_WEIGHTS:
                    new_sums = new_sums + (sums[GRAD_NORM + GRAD_BIAS + i] + x_grad,)
                else:
                    dots = dots + (tl.sum(x_grad, axis=1, keep_dims=True),)
            if (GRAD_X_BITS >> i) & 1:
                grad_x = grad_z
                if MIX != 0:
                    grad_x = tl.where(factors[i] != 0.0, grad_x * factors[i], 0.0)
                grad_x = times_weight(grad_x, W_ptrs, scalars, cols, i, D, HAS_WEIGHTS, CHANNEL_BITS)
                grad_x_ptr = Grad_x_ptrs[i]
                tl.store(grad_x_ptr + rows * D + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if GRAD_TABLE:
            store_gate_gradient(Grad_table_ptr, factors, dots, rows, num_rows, N, TABLE_N, BLOCK_ROWS, BLOCK_TABLE)
        sums = new_sums
    for i in tl.static_range(GRAD_WEIGHTS * N + GRAD_NORM + GRAD_BIAS):
        total = sums[i] if BLOCK_ROWS == 1 else tl.sum(sums[i], axis=0, keep_dims=True)
        partial_row = tl.program_id(0).to(tl.int64) * (GRAD_WEIGHTS * N + GRAD_NORM + GRAD_BIAS) + i
        tl.store(Partial_ptr + partial_row * D + cols, total, mask=in_row)


@triton.jit
def _fuse_weights_backward_kernel(
    Grad_z_ptr,
    X_ptrs,
    Table_ptr,
    Partial_ptr,
    Grad_z_row_stride,
    X_row_strides,
    num_rows,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    TABLE_N: tl.constexpr,
    MIX: tl.constexpr,
):
    """The weights' sums alone, BLOCK_D columns per program: partial[p, i] = sum over its rows of x_i * d_z."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32),)
    step = tl.num_programs(0) * BLOCK_ROWS
    for start in range(tl.program_id(0) * BLOCK_ROWS, num_rows, step):
        numbers = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)
        rows = numbers[:, None]
        mask = (rows < num_rows) & (cols < D)
        factors = ()
        if MIX != 0:
            factors = row_factors(Table_ptr, numbers, num_rows, TABLE_N, MIX)
        grad_z = tl.load(Grad_z_ptr + rows * Grad_z_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
        grad_z = grad_z.to(tl.float32)
        new_sums = ()
        for i in tl.static_range(N):
            offsets = rows * X_row_strides[i] * STRIDE_UNIT + cols
            x = load_input(X_ptrs[i], offsets, mask, factors, i, MIX)
            new_sums = new_sums + (sums[i] + x.to(tl.float32) * grad_z,)
        sums = new_sums
    for i in tl.static_range(N):
        total = sums[i] if BLOCK_ROWS == 1 else tl.sum(sums[i], axis=0, keep_dims=True)
        partial_row = tl.program_id(0).to(tl.int64) * N + i
        tl.store(Partial_ptr + partial_row * D + cols, total, mask=cols < D)


@dataclass(frozen=True)
class Wanted:
    """Which gradients a backward makes. Bit i of inputs: that of inputs[i]. z: that of attended and of the residual."""

    inputs: int
    weights: bool
    gates: bool
    z: bool
    norm_weight: bool
    norm_bias: bool


def launch_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor | None,
    inputs: Sequence[Tensor],
    mix: Mix,
    attended: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    eps: float,
    wanted: Wanted,
    grad_inputs: Sequence[Tensor],
    grad_z: Tensor,
    grad_table: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Fill grad_inputs, grad_z and grad_table where wanted; return the float32 sums of the weights, each (D,), and
    those of the norm's weight and bias."""
    num_rows, width = grad.shape
    num_inputs = len(inputs)
    num_norm_sums = wanted.norm_weight + wanted.norm_bias
    num_sums = num_norm_sums + wanted.weights * num_inputs
    num_kept = num_inputs if norm != "none" and h is None else 0
    weights_apart = wanted.weights and not sums_fit_registers(width, num_sums, num_kept, grad.element_size())
    fused_weights = wanted.weights and not weights_apart
    if weights_apart and norm != "none" and not wanted.z:
        grad_z = torch.empty_like(grad, memory_format=torch.contiguous_format)
    num_sums -= weights_apart * num_inputs
    tile = row_tile(arch_of(grad.device), width)
    num_programs = max(1, min(triton.cdiv(num_rows, tile.block_m), MAX_PARTIAL_SUMS))
    partial = grad.new_empty((num_programs, num_sums, width), dtype=torch.float32)
    xs = tuple(as_rows(x) for x in inputs)
    rows = [None if t is None else as_rows(t) for t in (grad, grad_h, h, attended)]
    unit = stride_unit(*rows, *xs)
    strides = [row_stride(t, unit) for t in rows]
    with on_device("fuse_modalities", _fuse_modalities_backward_kernel, grad):
        _fuse_modalities_backward_kernel[(num_programs,)](
            *rows[:3],
            xs,
            mix.weights,
            mix.scalars,
            mix.table,
            rows[3],
            None if norm_weight is None else norm_weight.contiguous(),
            tuple(grad_inputs),
            grad_z,
            grad_table,
            partial,
            *strides[:3],
            tuple(x.stride(0) // unit for x in xs),
            strides[3],
            num_rows,
            eps,
            N=num_inputs,
            D=width,
            BLOCK_ROWS=tile.block_m,
            BLOCK_D=tile.block_n,
            BLOCK_TABLE=max(mix.table_n, tile.block_n // 4),
            STRIDE_UNIT=unit,
            TABLE_N=mix.table_n,
            MIX=mix.kind,
            HAS_WEIGHTS=bool(mix.weights),
            HAS_SCALARS=mix.scalars is not None,
            CHANNEL_BITS=mix.channel_bits,
            NORM=NORM_CODES[norm],
            HAS_H=h is not None,
            HAS_ATTENDED=attended is not None,
            HAS_GRAD_H=grad_h is not None,
            GRAD_X_BITS=wanted.inputs,
            GRAD_WEIGHTS=fused_weights,
            GRAD_TABLE=wanted.gates,
            GRAD_Z=norm != "none" and (wanted.z or weights_apart),
            GRAD_NORM=wanted.norm_weight,
            GRAD_BIAS=wanted.norm_bias,
            num_warps=tile.num_warps,
        )
    sums = list(partial.sum(dim=0))
    weight_sums = sums[num_norm_sums:]
    if weights_apart:
        weight_sums = _launch_weights(grad if norm == "none" else grad_z, xs, mix)
    return weight_sums, sums[:num_norm_sums]


def _launch_weights(grad_z: Tensor, xs: tuple[Tensor, ...], mix: Mix) -> list[Tensor]:
    """The weights' sums, each (D,) float32, from the stored d_z: n + 1 more reads."""
    num_rows, width = grad_z.shape
    tile = weights_tile(arch_of(grad_z.device))
    grad_rows = as_rows(grad_z)
    unit = stride_unit(grad_rows, *xs)
    num_programs = max(1, min(triton.cdiv(num_rows, tile.block_m), MAX_PARTIAL_SUMS // 4))
    partial = grad_z.new_empty((num_programs, len(xs), width), dtype=torch.float32)
    with on_device("fuse_modalities", _fuse_weights_backward_kernel, grad_z):
        _fuse_weights_backward_kernel[(num_programs, triton.cdiv(width, tile.block_n))](
            grad_rows,
            xs,
            mix.table,
            partial,
            grad_rows.stride(0) // unit,
            tuple(x.stride(0) // unit for x in xs),
            num_rows,
            N=len(xs),
            D=width,
            BLOCK_ROWS=tile.block_m,
            BLOCK_D=tile.block_n,
            STRIDE_UNIT=unit,
            TABLE_N=mix.table_n,
            MIX=mix.kind,
            num_warps=tile.num_warps,
        )
    return list(partial.sum(dim=0))
