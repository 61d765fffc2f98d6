"""Embedding merge, as its launcher launches it."""

from __future__ import annotations

from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase


def cases(arch: str) -> list[StaticCase]:
    """Forward (one read, one write per row) and backward. The width is an argument: one compilation serves them all."""
    from trichord_kernels.ops import merge_embeddings as op

    kernels = {"fwd": op._merge_embeddings_forward_kernel, "bwd": op._merge_embeddings_backward_kernel}
    return [
        _case(arch, name, kernel, dtype, unit)
        for name, kernel in kernels.items()
        for dtype, unit in (("bf16", 8), ("fp32", 8))
    ]


def _case(arch: str, name: str, kernel: Any, dtype: str, unit: int) -> StaticCase:
    from trichord_kernels.tables.merge_embeddings import tile_for

    tile = tile_for(arch, ITEM_BYTES[dtype])
    constexprs = {"STRIDE_UNIT": unit, "BLOCK_ROWS": tile.block_m, "BLOCK_D": tile.block_n}
    return StaticCase(
        name=f"merge_embeddings_{name}.{dtype}",
        kernel=kernel,
        signature={arg: _argument_type(arg, constexprs, dtype) for arg in kernel.arg_names},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        row_bytes=2 * tile.block_m * tile.block_n * ITEM_BYTES[dtype],
        shared_bytes=0,
        is_forward=name == "fwd",
        needs_odd_width=True,  # the width comes in units of 8 elements, so the code is that of 4104 columns, too
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")},
    )


def _argument_type(arg: str, constexprs: dict[str, Any], dtype: str) -> str:
    if arg in constexprs:
        return "constexpr"
    if arg in ("Inverse_ptr", "Index_ptr"):
        return "*i32"
    return f"*{dtype}" if arg.endswith("_ptr") else "i32"
