"""Feature rows into a stream of embeddings: Triton forward and backward, registered as two torch ops.

    inverse[t]  = m where positions[m] == t, else -1       (T,) int32, built on the device by torch's own scatter
    out[t]      = features[inverse[t]] where inverse[t] >= 0, else embeds[t]

Backward, exact (rows are moved, nothing is added):

    d_embeds[t]   = d_out[t] where inverse[t] < 0, else 0
    d_features[m] = d_out[positions[m]] where positions[m] >= 0, else 0

The forward writes each row of the stream once and reads once what goes there: the source of a row is chosen by its
address, not by reading both.
"""

# Triton types a jitted kernel as the function it was made from: neither `kernel[grid]` nor `num_warps` is known there.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops.launch import as_rows, check_row_operands, on_device, stride_unit
from trichord_kernels.reference.merge_embeddings import check_operands
from trichord_kernels.tables.merge_embeddings import tile_for
from trichord_kernels.tables.tile import arch_of


@triton.jit
def _merge_embeddings_forward_kernel(
    Embeds_ptr,
    Features_ptr,
    Inverse_ptr,
    Out_ptr,
    Embeds_row_stride,
    Features_row_stride,
    num_rows,
    width,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_ROWS rows of out, BLOCK_D columns at a time. Strides and width count in units of STRIDE_UNIT elements."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    in_stream = rows < num_rows
    feature_rows = tl.load(Inverse_ptr + rows, mask=in_stream, other=-1).to(tl.int64)
    kept_ptr = Embeds_ptr + rows * Embeds_row_stride * STRIDE_UNIT
    placed_ptr = Features_ptr + feature_rows * Features_row_stride * STRIDE_UNIT
    out_ptr = Out_ptr + rows * width * STRIDE_UNIT
    for start in range(0, width * STRIDE_UNIT, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]
        mask = in_stream & (cols < width * STRIDE_UNIT)
        source_ptr = tl.where(feature_rows < 0, kept_ptr + cols, placed_ptr + cols)
        tl.store(out_ptr + cols, tl.load(source_ptr, mask=mask), mask=mask)


@triton.jit
def _merge_embeddings_backward_kernel(
    Grad_out_ptr,
    Index_ptr,
    Grad_ptr,
    Grad_out_row_stride,
    num_rows,
    width,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad[r] = grad_out[index[r]], or 0 where index[r] < 0: rows of 0 are written without a read."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    in_grad = rows < num_rows
    index = tl.load(Index_ptr + rows, mask=in_grad, other=-1).to(tl.int64)
    source_ptr = Grad_out_ptr + index * Grad_out_row_stride * STRIDE_UNIT
    grad_ptr = Grad_ptr + rows * width * STRIDE_UNIT
    for start in range(0, width * STRIDE_UNIT, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]
        in_row = cols < width * STRIDE_UNIT
        moved = tl.load(source_ptr + cols, mask=(index >= 0) & in_row, other=0.0)
        tl.store(grad_ptr + cols, moved, mask=in_grad & in_row)


def inverse_map(positions: Tensor, num_rows: int) -> Tensor:
    """(M,) positions -> (T,) int32: the number of the feature row that goes there, -1 where none does."""
    inverse = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=positions.device)
    numbers = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    # Rows without a place all write the one entry behind the stream.
    inverse.scatter_(0, torch.where(positions < 0, num_rows, positions).long(), numbers)
    return inverse[:num_rows]


def kept_rows(positions: Tensor, num_rows: int) -> Tensor:
    """(M,) positions -> (T,) int32: t where row t is kept, -1 where a feature took its place."""
    kept = torch.arange(num_rows + 1, dtype=torch.int32, device=positions.device)
    kept.index_fill_(0, torch.where(positions < 0, num_rows, positions).long(), -1)
    return kept[:num_rows]


@torch.library.custom_op("trichord::merge_embeddings_forward", mutates_args=())
def merge_embeddings_forward(embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Launch the forward. Returns out (T, D), contiguous."""
    if choose_backend(embeds.device) == "reference":
        return reference.merge_embeddings(embeds, features, positions)
    _check(embeds, features, positions)
    out = _forward_outputs(embeds)
    embeds_rows, features_rows = as_rows(embeds), as_rows(features)
    unit = stride_unit(embeds_rows, features_rows, out)
    tile = tile_for(arch_of(embeds.device), embeds.element_size())
    with on_device("merge_embeddings", _merge_embeddings_forward_kernel, embeds):
        if out.numel():
            _merge_embeddings_forward_kernel[(triton.cdiv(out.shape[0], tile.block_m),)](
                embeds_rows,
                features_rows,
                inverse_map(positions, out.shape[0]),
                out,
                embeds_rows.stride(0) // unit,
                features_rows.stride(0) // unit,
                out.shape[0],
                out.shape[1] // unit,
                STRIDE_UNIT=unit,
                BLOCK_ROWS=tile.block_m,
                BLOCK_D=tile.block_n,
                num_warps=tile.num_warps,
            )
    return out


@torch.library.custom_op("trichord::merge_embeddings_backward", mutates_args=())
def merge_embeddings_backward(
    grad_out: Tensor, positions: Tensor, embeds_grad: bool, features_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward once per gradient wanted. Returns d_embeds (T, D) and d_features (M, D), contiguous; one that
    is not wanted has 0 elements."""
    grad_embeds, grad_features = _backward_outputs(grad_out, positions, embeds_grad, features_grad)
    if embeds_grad:
        _move_rows(grad_out, kept_rows(positions, grad_out.shape[0]), grad_embeds)
    if features_grad:
        _move_rows(grad_out, positions, grad_features)
    return grad_embeds, grad_features


def _move_rows(source: Tensor, index: Tensor, out: Tensor) -> None:
    """out[r] = source[index[r]], or 0 where index[r] < 0."""
    if choose_backend(source.device) == "reference":
        if not source.shape[0]:
            out.zero_()  # no row of the stream, so none is moved
        else:
            out.copy_(source.index_select(0, index.clamp_min(0)).masked_fill_((index < 0)[:, None], 0))
        return
    source_rows = as_rows(source)
    unit = stride_unit(source_rows, out)
    tile = tile_for(arch_of(source.device), source.element_size())
    with on_device("merge_embeddings", _merge_embeddings_backward_kernel, source):
        if out.numel():
            _merge_embeddings_backward_kernel[(triton.cdiv(out.shape[0], tile.block_m),)](
                source_rows,
                index.contiguous(),
                out,
                source_rows.stride(0) // unit,
                out.shape[0],
                out.shape[1] // unit,
                STRIDE_UNIT=unit,
                BLOCK_ROWS=tile.block_m,
                BLOCK_D=tile.block_n,
                num_warps=tile.num_warps,
            )


def _check(embeds: Tensor, features: Tensor, positions: Tensor) -> None:
    check_operands(embeds, features, positions)
    check_row_operands("merge_embeddings", embeds, features, positions)


def _forward_outputs(embeds: Tensor) -> Tensor:
    return embeds.new_empty(embeds.shape)


def _backward_outputs(
    grad_out: Tensor, positions: Tensor, embeds_grad: bool, features_grad: bool
) -> tuple[Tensor, Tensor]:
    width = grad_out.shape[1]
    embeds_shape = grad_out.shape if embeds_grad else (0,)
    features_shape = (positions.shape[0], width) if features_grad else (0,)
    return grad_out.new_empty(embeds_shape), grad_out.new_empty(features_shape)


@merge_embeddings_forward.register_fake
def _forward_fake(embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    check_operands(embeds, features, positions)
    return _forward_outputs(embeds)


@merge_embeddings_backward.register_fake
def _backward_fake(
    grad_out: Tensor, positions: Tensor, embeds_grad: bool, features_grad: bool
) -> tuple[Tensor, Tensor]:
    return _backward_outputs(grad_out, positions, embeds_grad, features_grad)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad_out: Tensor):
    (positions,) = ctx.saved_tensors
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    grads = merge_embeddings_backward(grad_out, positions, *wanted)
    return *(grad if needed else None for grad, needed in zip(grads, wanted)), None


# No autocast rule: as for torch's own index_copy, the operands keep the one dtype they come in.
merge_embeddings_forward.register_autograd(_backward, setup_context=_save_for_backward)


def merge_embeddings(embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """The Triton path of `trichord_kernels.merge_embeddings`, which documents it."""
    return merge_embeddings_forward(embeds, features, positions)
