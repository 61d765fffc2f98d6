"""Forward of fuse_modalities: mix, residual add and norm of whole rows, one Triton kernel.

    z   = sum_i c_i * x_i + attended     float32; c_i a weight (scalar or per column), a gate, 0 or 1 (presence)
    h   = residual + z                   rounded to x's dtype once
    out = norm(h)                        float32 statistics

A table (T, 4 or 8) of float32 carries what differs by row: gate logits or presence. It is padded to 16 bytes so that a
row of it is one 128-bit load, which all threads of the row share.
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
from torch.nn import functional

from trichord_kernels.ops.launch import as_rows, on_device, stride_unit
from trichord_kernels.tables.fuse_modalities import row_tile
from trichord_kernels.tables.tile import arch_of

# How a row's factors come about, and which norm follows: constants of the kernels.
MIX_FIXED, MIX_PRESENT, MIX_GATED = 0, 1, 2
NORM_CODES = {"none": 0, "rms": 1, "layer": 2}
TABLE_UNIT = 4  # float32 entries in 16 bytes


@triton.jit
def load_four(Table_ptr, offsets, mask):
    """Four float32 entries from each offset (BLOCK_ROWS,): one 128-bit load, taken apart inside the thread.

    Sums over a (BLOCK_ROWS, 4) tile say the same, but compile into 81 barriers where BLOCK_ROWS is 1.
    """
    table = tl.load(Table_ptr + offsets[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(table, (table.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_entries(Table_ptr, offsets, mask, TABLE_N: tl.constexpr):
    """The TABLE_N (4 or 8) entries from each offset, a tuple of (BLOCK_ROWS,)."""
    entries = load_four(Table_ptr, offsets, mask)
    if TABLE_N == 8:
        entries = entries + load_four(Table_ptr, offsets + 4, mask)
    return entries


@triton.jit
def row_factors(Table_ptr, numbers, num_rows, TABLE_N: tl.constexpr, MIX: tl.constexpr):
    """A factor (BLOCK_ROWS, 1) per input: presence as it stands, or the softmax of gate logits (-inf: absent)."""
    entries = load_entries(Table_ptr, numbers * TABLE_N, numbers < num_rows, TABLE_N)
    if MIX == 2:
        highest = entries[0]
        for i in tl.static_range(1, TABLE_N):
            highest = tl.maximum(highest, entries[i])
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.zeros_like(highest)
        for i in tl.static_range(TABLE_N):
            total += tl.exp(entries[i] - highest)
        total = tl.where(total == 0.0, 1.0, total)
    factors = ()
    for i in tl.static_range(TABLE_N):
        factor = entries[i]
        if MIX == 2:
            factor = tl.exp(factor - highest) / total
        factors = factors + (factor[:, None],)
    return factors


@triton.jit
def load_scalars(Scalars_ptr, TABLE_N: tl.constexpr):
    """The scalar weights, a tuple of (1, 1)."""
    first = tl.arange(0, 1)
    entries = load_entries(Scalars_ptr, first, first == 0, TABLE_N)
    scalars = ()
    for i in tl.static_range(TABLE_N):
        scalars = scalars + (entries[i][:, None],)
    return scalars


@triton.jit
def load_columns(W_ptr, cols, D: tl.constexpr):
    return tl.load(W_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def load_input(X_ptr, offsets, mask, factors, i: tl.constexpr, MIX: tl.constexpr):
    """Rows of inputs[i]; where it is absent (factor 0) nothing is read."""
    if MIX != 0:
        mask = mask & (factors[i] != 0.0)
    return tl.load(X_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def times_weight(
    x, W_ptrs, scalars, cols, i: tl.constexpr, D: tl.constexpr, HAS_WEIGHTS: tl.constexpr, CHANNEL_BITS: tl.constexpr
):
    """x (BLOCK_ROWS, BLOCK_D) float32 times weights[i], if there is one."""
    if HAS_WEIGHTS:
        weight = load_columns(W_ptrs[i], cols, D) if (CHANNEL_BITS >> i) & 1 else scalars[i]
        x = x * weight
    return x


@triton.jit
def normalize(h, in_row, eps, D: tl.constexpr, NORM: tl.constexpr):
    """h (BLOCK_ROWS, BLOCK_D) float32 -> h without its mean (layer) over its deviation, and 1 / deviation."""
    if NORM == 2:
        h = tl.where(in_row, h - tl.sum(h, axis=1, keep_dims=True) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)
    return h * rstd, rstd


@triton.jit
def _fuse_modalities_forward_kernel(
    X_ptrs,
    W_ptrs,
    Scalars_ptr,
    Table_ptr,
    Attended_ptr,
    Residual_ptr,
    Norm_w_ptr,
    Norm_b_ptr,
    Out_ptr,
    H_ptr,
    X_row_strides,
    Attended_row_stride,
    Residual_row_stride,
    num_rows,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    TABLE_N: tl.constexpr,
    MIX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALARS: tl.constexpr,
    CHANNEL_BITS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_ATTENDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
):
    """BLOCK_ROWS rows. H is written with a residual or without a norm, Out with a norm; both are contiguous."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = numbers[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (cols < D)
    z = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    if HAS_ATTENDED:
        offsets = rows * Attended_row_stride * STRIDE_UNIT + cols
        z += tl.load(Attended_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        offsets = rows * Residual_row_stride * STRIDE_UNIT + cols
        z += tl.load(Residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    factors, scalars = (), ()
    if MIX != 0:
        factors = row_factors(Table_ptr, numbers, num_rows, TABLE_N, MIX)
    if HAS_SCALARS:
        scalars = load_scalars(Scalars_ptr, TABLE_N)
    for i in tl.static_range(N):
        offsets = rows * X_row_strides[i] * STRIDE_UNIT + cols
        x = load_input(X_ptrs[i], offsets, mask, factors, i, MIX).to(tl.float32)
        if MIX != 0:
            x *= factors[i]
        z += times_weight(x, W_ptrs, scalars, cols, i, D, HAS_WEIGHTS, CHANNEL_BITS)
    h = z.to(H_ptr.dtype.element_ty)
    if HAS_RESIDUAL or NORM == 0:
        tl.store(H_ptr + rows * D + cols, h, mask=mask)
    if NORM != 0:
        normed, _ = normalize(h.to(tl.float32), cols < D, eps, D, NORM)
        w = load_columns(Norm_w_ptr, cols, D)
        if NORM == 1:
            normed = normed.to(h.dtype).to(tl.float32)  # Llama rounds here
        out = normed * w
        if HAS_NORM_BIAS:
            out += load_columns(Norm_b_ptr, cols, D)
        tl.store(Out_ptr + rows * D + cols, out.to(h.dtype), mask=mask)


@dataclass(frozen=True)
class Mix:
    """What a launcher tells both kernels of the factors.

    table (T, table_n) float32: what differs by row, None for fixed factors. scalars (table_n,) float32: the weights
    that are scalars, None without one. Bit i of channel_bits: weights[i] is (D,).
    """

    kind: int
    table: Tensor | None
    scalars: Tensor | None
    weights: tuple[Tensor, ...]
    channel_bits: int
    table_n: int


def plan_mix(
    num_inputs: int, width: int, weights: Sequence[Tensor], gate_logits: Tensor | None, present: Tensor | None
) -> Mix:
    """The factors' kind, table and scalars, by torch ops on the device. Absent gates are -inf, padding is absent."""
    padding = -num_inputs % TABLE_UNIT
    channel_bits = sum(1 << i for i, weight in enumerate(weights) if weight.shape[0] == width)
    scalars = None
    if weights and channel_bits != (1 << num_inputs) - 1:
        scalars = torch.cat([w[:1] for w in weights] + [weights[0].new_zeros(padding, dtype=torch.float32)]).float()
    kind, table = MIX_FIXED, None
    if gate_logits is not None:
        logits = gate_logits.to(torch.float32)
        if present is not None:
            logits = logits.masked_fill(~present, float("-inf"))
        kind, table = MIX_GATED, functional.pad(logits, (0, padding), value=float("-inf")).contiguous()
    elif present is not None:
        kind, table = MIX_PRESENT, functional.pad(present.to(torch.float32), (0, padding)).contiguous()
    return Mix(kind, table, scalars, tuple(w.contiguous() for w in weights), channel_bits, num_inputs + padding)


def row_stride(x: Tensor | None, unit: int) -> int:
    return 0 if x is None else x.stride(0) // unit


def launch_forward(
    inputs: Sequence[Tensor],
    mix: Mix,
    attended: Tensor | None,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    out: Tensor,
    h: Tensor,
) -> None:
    """Fill `out` (with a norm) and `h` (with a residual, or without a norm)."""
    num_rows, width = inputs[0].shape
    xs = tuple(as_rows(x) for x in inputs)
    attended, residual = (None if t is None else as_rows(t) for t in (attended, residual))
    unit = stride_unit(*xs, attended, residual)
    tile = row_tile(arch_of(out.device), width)
    with on_device("fuse_modalities", _fuse_modalities_forward_kernel, inputs[0]):
        if num_rows:
            _fuse_modalities_forward_kernel[(triton.cdiv(num_rows, tile.block_m),)](
                xs,
                mix.weights,
                mix.scalars,
                mix.table,
                attended,
                residual,
                None if norm_weight is None else norm_weight.contiguous(),
                None if norm_bias is None else norm_bias.contiguous(),
                out,
                h,
                tuple(x.stride(0) // unit for x in xs),
                row_stride(attended, unit),
                row_stride(residual, unit),
                num_rows,
                eps,
                N=len(xs),
                D=width,
                BLOCK_ROWS=tile.block_m,
                BLOCK_D=tile.block_n,
                STRIDE_UNIT=unit,
                TABLE_N=mix.table_n,
                MIX=mix.kind,
                HAS_WEIGHTS=bool(mix.weights),
                HAS_SCALARS=mix.scalars is not None,
                CHANNEL_BITS=mix.channel_bits,
                NORM=NORM_CODES[norm],
                HAS_ATTENDED=attended is not None,
                HAS_RESIDUAL=residual is not None,
                HAS_NORM_BIAS=norm_bias is not None,
                num_warps=tile.num_warps,
            )
