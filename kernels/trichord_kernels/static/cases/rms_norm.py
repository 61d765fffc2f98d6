"""RMSNorm, as its launcher launches it."""

from __future__ import annotations

from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase


def cases(arch: str) -> list[StaticCase]:
    """bf16 at 4096 is the default; the others vary the width or the dtypes, up to the widest row in float32."""
    grid = [("bf16", "bf16", hidden_size) for hidden_size in (64, 1024, 4096, 4104, 8192)]
    grid += [("bf16", "fp32", 4096), ("fp16", "fp16", 4096), ("fp32", "fp32", 8192)]
    return [
        make(arch, dtype, weight_dtype, hidden_size, residual)
        for dtype, weight_dtype, hidden_size in grid
        for make in (_rms_norm_forward, _rms_norm_backward)
        for residual in (False, True)
    ]


def _rms_norm_forward(arch: str, dtype: str, weight_dtype: str, hidden_size: int, residual: bool) -> StaticCase:
    from trichord_kernels.ops import rms_norm as op

    return _row_case(
        arch,
        f"{'add_' if residual else ''}rms_norm_fwd.{hidden_size}",
        op._rms_norm_forward_kernel,
        dtype,
        weight_dtype,
        hidden_size,
        num_row_operands=4 if residual else 2,
        is_forward=True,
        flags={"HAS_RESIDUAL": residual},
    )


def _rms_norm_backward(arch: str, dtype: str, weight_dtype: str, hidden_size: int, residual: bool) -> StaticCase:
    from trichord_kernels.ops import rms_norm as op

    return _row_case(
        arch,
        f"{'add_' if residual else ''}rms_norm_bwd.{hidden_size}",
        op._rms_norm_backward_kernel,
        dtype,
        weight_dtype,
        hidden_size,
        num_row_operands=4 if residual else 3,
        is_forward=False,
        flags={"HAS_GRAD_NEW_RESIDUAL": residual, "HAS_GRAD_WEIGHT": True},
    )


def _row_case(
    arch: str,
    name: str,
    kernel: Any,
    dtype: str,
    weight_dtype: str,
    hidden_size: int,
    num_row_operands: int,
    is_forward: bool,
    flags: dict[str, bool],
) -> StaticCase:
    """A row kernel as launched on contiguous or strided 16-byte-aligned rows: aligned pointers, plain i32 strides."""
    from trichord_kernels.ops.launch import STRIDE_UNIT
    from trichord_kernels.ops.rms_norm import row_tile

    tile = row_tile(hidden_size, is_forward, arch)
    constexprs = {
        "D": hidden_size,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_D": tile.block_d,
        "STRIDE_UNIT": STRIDE_UNIT,
        **flags,
    }
    tile_elements = tile.block_rows * tile.block_d
    return StaticCase(
        name=f"{name}.{dtype}" + (f".w_{weight_dtype}" if weight_dtype != dtype else ""),
        kernel=kernel,
        signature={arg: _argument_type(arg, constexprs, dtype, weight_dtype) for arg in kernel.arg_names},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        row_bytes=num_row_operands * tile_elements * ITEM_BYTES[dtype],
        shared_bytes=tile_elements * ITEM_BYTES[weight_dtype] if is_forward else 0,
        is_forward=is_forward,
        needs_odd_width=hidden_size % 8 == 0 and hidden_size % 16 != 0,
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")},
    )


def _argument_type(arg: str, constexprs: dict[str, Any], dtype: str, weight_dtype: str) -> str:
    if arg in constexprs:
        return "constexpr"
    if arg.endswith("_partial_ptr"):
        return "*fp32"
    if arg.endswith("_ptr"):
        return f"*{weight_dtype if arg == 'W_ptr' else dtype}"
    return "fp32" if arg == "eps" else "i32"
