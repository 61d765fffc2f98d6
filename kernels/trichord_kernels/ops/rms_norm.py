"""RMSNorm with the residual add in front: Triton forward and backward, registered as two torch ops.

    h = x + residual              rounded to x's dtype (h = x without a residual)
    n = h / sqrt(mean(h^2) + eps) statistics float32, n rounded to x's dtype
    out = n * weight              rounded to x's dtype

Backward, with g = d_out * weight, in float32:

    dh = rstd * (g - h * rstd^2 * mean(g * h)) + d_new_residual   = dx = d_residual
    d_weight = sum over rows of d_out * n

The row statistic is computed again in the backward instead of being stored, so that both passes read and write whole
rows only (docs/decisions/rms-norm-recomputes-its-statistic.md). d_weight is summed in two stages (per program, then
over programs), never by atomics, so two runs give the same bits.
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels.errors import KernelError
from trichord_kernels.ops.launch import as_rows, check_row_operands, on_device, stride_unit
from trichord_kernels.reference.rms_norm import check_operands
from trichord_kernels.tables.tile import arch_of

# The backward keeps a row of h, d_out, weight and d_weight in registers: at 16384 it spills 212-416 bytes per thread
# on sm_80, sm_90 and sm_100, and 32 warps are more than an AMD workgroup holds (`trichord bench kernels --static`).
MAX_HIDDEN_SIZE = 8192
# Programs of the backward, each with its own float32 row of d_weight. A function of nothing but the row count, so
# that the sum has the same order on every GPU; 512 are 3.9 per SM on an H100 and cost 2 % of the traffic at 16k rows.
MAX_PARTIAL_SUMS = 512


@dataclass(frozen=True)
class RowTile:
    """Rows and columns one program holds at a time, and its warps."""

    block_rows: int
    block_d: int
    num_warps: int


def row_tile(hidden_size: int, is_forward: bool, arch: str) -> RowTile:
    """Elements per thread: 16 forward, two 128-bit accesses per operand in half precision; 8 backward, where a thread
    keeps d_weight and the weight, too: 64 registers and half the warp slots in use, against 92-126 and a quarter.

    Chosen from compiled code (`trichord bench kernels --static`), not timed. A warp of AMD's has 64 threads and holds
    8 per thread with the forward's count already; its workgroup takes no more than 16 of them.
    """
    block_d = triton.next_power_of_2(hidden_size)
    block_rows = max(1, 2048 // block_d)
    elements_per_warp = 512 if is_forward or arch.startswith("gfx") else 256
    return RowTile(block_rows, block_d, num_warps=max(4, block_rows * block_d // elements_per_warp))


@triton.jit
def _rms_norm_forward_kernel(
    X_ptr,
    Residual_ptr,
    W_ptr,
    Out_ptr,
    New_residual_ptr,
    X_row_stride,
    Residual_row_stride,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """out = norm(x + residual) * weight for BLOCK_ROWS rows; the outputs are contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (cols < D)
    h = tl.load(X_ptr + rows * X_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(Residual_ptr + rows * Residual_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
        tl.store(New_residual_ptr + rows * D + cols, h, mask=mask)
    w = tl.load(W_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    wide = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / D + eps)
    normed = (wide * rstd).to(h.dtype).to(tl.float32)  # Llama rounds here
    tl.store(Out_ptr + rows * D + cols, (normed * w).to(h.dtype), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    Grad_out_ptr,
    Grad_new_residual_ptr,
    H_ptr,
    W_ptr,
    Grad_h_ptr,
    Grad_w_partial_ptr,
    Grad_out_row_stride,
    Grad_new_residual_row_stride,
    H_row_stride,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HAS_GRAD_NEW_RESIDUAL: tl.constexpr,
    HAS_GRAD_WEIGHT: tl.constexpr,
):
    """dh for every num_programs-th tile of rows, and this program's share of d_weight as one float32 row."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    w = tl.load(W_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    grad_w = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    step = tl.num_programs(0) * BLOCK_ROWS
    for start in range(tl.program_id(0) * BLOCK_ROWS, num_rows, step):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < num_rows) & (cols < D)
        h = tl.load(H_ptr + rows * H_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
        grad_out = tl.load(Grad_out_ptr + rows * Grad_out_row_stride * STRIDE_UNIT + cols, mask=mask, other=0.0)
        wide = h.to(tl.float32)
        grad_out = grad_out.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / D + eps)
        normed = wide * rstd
        grad_normed = grad_out * w
        grad_h = rstd * (grad_normed - normed * (tl.sum(grad_normed * normed, axis=1, keep_dims=True) / D))
        if HAS_GRAD_NEW_RESIDUAL:
            offsets = rows * Grad_new_residual_row_stride * STRIDE_UNIT + cols
            grad_h += tl.load(Grad_new_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_GRAD_WEIGHT:
            grad_w += grad_out * normed.to(h.dtype).to(tl.float32)
        tl.store(Grad_h_ptr + rows * D + cols, grad_h.to(h.dtype), mask=mask)
    if HAS_GRAD_WEIGHT:
        total = grad_w if BLOCK_ROWS == 1 else tl.sum(grad_w, axis=0, keep_dims=True)
        tl.store(Grad_w_partial_ptr + tl.program_id(0).to(tl.int64) * D + cols, total, mask=cols < D)


@torch.library.custom_op("trichord::rms_norm_forward", mutates_args=())
def rms_norm_forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the forward. Returns out and new_residual, contiguous; new_residual has 0 elements without residual."""
    _check(x, weight, residual)
    out, new_residual = _forward_outputs(x, residual)
    tile = row_tile(x.shape[-1], True, arch_of(x.device))
    x_rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    unit = stride_unit(x_rows, residual_rows)
    num_rows = x_rows.shape[0]
    with on_device("rms_norm", _rms_norm_forward_kernel, x):
        if num_rows:
            _rms_norm_forward_kernel[(triton.cdiv(num_rows, tile.block_rows),)](
                x_rows,
                residual_rows,
                weight.contiguous(),
                out,
                new_residual,
                x_rows.stride(0) // unit,
                0 if residual_rows is None else residual_rows.stride(0) // unit,
                num_rows,
                eps,
                D=x.shape[-1],
                BLOCK_ROWS=tile.block_rows,
                BLOCK_D=tile.block_d,
                STRIDE_UNIT=unit,
                HAS_RESIDUAL=residual is not None,
                num_warps=tile.num_warps,
            )
    return out, new_residual


@torch.library.custom_op("trichord::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_out: Tensor, grad_new_residual: Tensor | None, h: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward. Returns dh (contiguous) and d_weight (0 elements unless `weight_grad`)."""
    _check(h, weight, grad_new_residual)
    grad_h, grad_weight = _backward_outputs(h, weight, weight_grad)
    tile = row_tile(h.shape[-1], False, arch_of(h.device))
    rows = [None if t is None else as_rows(t) for t in (grad_out, grad_new_residual, h)]
    unit = stride_unit(*rows)
    num_rows = rows[2].shape[0]
    num_programs = min(triton.cdiv(num_rows, tile.block_rows), MAX_PARTIAL_SUMS)
    partial = h.new_empty((num_programs if weight_grad else 0, h.shape[-1]), dtype=torch.float32)
    with on_device("rms_norm", _rms_norm_backward_kernel, h):
        if num_rows:
            _rms_norm_backward_kernel[(num_programs,)](
                *rows,
                weight.contiguous(),
                grad_h,
                partial,
                *(0 if t is None else t.stride(0) // unit for t in rows),
                num_rows,
                eps,
                D=h.shape[-1],
                BLOCK_ROWS=tile.block_rows,
                BLOCK_D=tile.block_d,
                STRIDE_UNIT=unit,
                HAS_GRAD_NEW_RESIDUAL=grad_new_residual is not None,
                HAS_GRAD_WEIGHT=weight_grad,
                num_warps=tile.num_warps,
            )
    if weight_grad:
        grad_weight.copy_(partial.sum(dim=0))
    return grad_h, grad_weight


def _check(h: Tensor, weight: Tensor, other: Tensor | None) -> None:
    check_operands(h, weight, other)
    check_row_operands("rms_norm", h, weight, other)
    if not 1 <= h.shape[-1] <= MAX_HIDDEN_SIZE:
        raise KernelError(
            f"rms_norm: the Triton kernel takes rows of 1 to {MAX_HIDDEN_SIZE} elements, got {h.shape[-1]}; set "
            "TRICHORD_KERNELS=reference"
        )


def _forward_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


def _backward_outputs(h: Tensor, weight: Tensor, weight_grad: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape if weight_grad else (0,))


@rms_norm_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, weight, residual)
    return _forward_outputs(x, residual)


@rms_norm_backward.register_fake
def _backward_fake(
    grad_out: Tensor, grad_new_residual: Tensor | None, h: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return _backward_outputs(h, weight, weight_grad)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, residual, eps = inputs
    # The Parameter itself, not a view or a copy: under ZeRO-3 its storage is swapped between forward and backward.
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.has_residual, ctx.eps = residual is not None, eps
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_new_residual: Tensor | None):
    h, weight = ctx.saved_tensors
    if not ctx.has_residual:
        grad_new_residual = None
    if grad_out is None:  # only new_residual was used: its gradient passes through the add
        return grad_new_residual, None, grad_new_residual, None
    grad_h, grad_weight = rms_norm_backward(
        grad_out, grad_new_residual, h, weight, ctx.eps, bool(ctx.needs_input_grad[1])
    )
    return (
        grad_h,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_h if ctx.has_residual else None,
        None,
    )


rms_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)
# float32 is torch's own policy for norms under autocast.
for _device_type in ("cuda", "cpu"):
    rms_norm_forward.register_autocast(_device_type, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The Triton path of `trichord_kernels.rms_norm`, which documents it."""
    out, new_residual = rms_norm_forward(x, weight, residual, eps)
    return out if residual is None else (out, new_residual)
