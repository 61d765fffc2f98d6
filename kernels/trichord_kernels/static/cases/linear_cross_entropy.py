"""The two row kernels of linear_cross_entropy, as their launcher launches them: V constant, rows of a padded buffer."""

from __future__ import annotations

from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase

# Llama 2, Llama 3, Qwen 3, an odd one, and one (BART) that is a multiple of 8 but not of 16.
VOCAB_SIZES = (32000, 128256, 151936, 4097, 50264)


def cases(arch: str) -> list[StaticCase]:
    """Plain cross-entropy at every size; smoothing and softcap at one of them."""
    grid = [(vocab_size, dtype, "") for vocab_size in VOCAB_SIZES for dtype in ("bf16", "fp32")]
    grid += [(128256, "fp16", ""), (128256, "bf16", "smooth"), (128256, "bf16", "softcap"), (4097, "fp32", "both")]
    return [_row_case(arch, is_forward, *item) for item in grid for is_forward in (True, False)]


def _row_case(arch: str, is_forward: bool, vocab_size: int, dtype: str, variant: str) -> StaticCase:
    from trichord_kernels.ops import linear_cross_entropy as op
    from trichord_kernels.tables.linear_cross_entropy import row_tile

    kernel: Any = op._linear_cross_entropy_forward_kernel if is_forward else op._linear_cross_entropy_backward_kernel
    tile = row_tile(arch, ITEM_BYTES[dtype])
    constexprs = {
        "V": vocab_size,
        "ROW_MULTIPLE": op.ROW_MULTIPLE,
        "LANES": tile.block_m,
        "WIDTH": tile.block_n,
        "HAS_SMOOTHING": variant in ("smooth", "both"),
        "HAS_SOFTCAP": variant in ("softcap", "both"),
    }
    return StaticCase(
        name=".".join(
            filter(None, (f"linear_cross_entropy_{'fwd' if is_forward else 'bwd'}", str(vocab_size), dtype, variant))
        ),
        kernel=kernel,
        signature={arg: _argument_type(arg, constexprs, dtype) for arg in kernel.arg_names},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        row_bytes=(1 if is_forward else 2) * tile.block_m * tile.block_n * ITEM_BYTES[dtype],
        shared_bytes=0,
        is_forward=is_forward,
        needs_odd_width=vocab_size % 16 != 0,
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")},
    )


def _argument_type(arg: str, constexprs: dict[str, Any], dtype: str) -> str:
    if arg in constexprs:
        return "constexpr"
    if arg.endswith("_ptr"):
        return {"Logits_ptr": f"*{dtype}", "Labels_ptr": "*i64"}.get(arg, "*fp32")
    return "i32" if arg in ("ignore_index", "num_columns") else "fp32"
