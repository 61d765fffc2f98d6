"""Contrastive loss: both kernels at common embedding sizes, as the launchers launch them.

The backward of the symmetric loss (both parts) and of sigmoid (one) differ in the loop. float32 uses no tensor cores by
choice (`input_precision="ieee"`) and is only reported.
"""

from __future__ import annotations

from typing import Any

from trichord_kernels.static.case import StaticCase

_SIZES = (64, 128, 256, 512, 768, 1024)


def cases(arch: str) -> list[StaticCase]:
    """bf16 at every size; fp16, sigmoid, sizes that are padded, and what the smaller parts run, at one or two."""
    grid = [("infonce", "bf16", size) for size in _SIZES]
    grid += [("infonce", "bf16", 96), ("infonce", "bf16", 1160), ("infonce", "fp16", 256), ("infonce", "fp16", 1024)]
    grid += [("sigmoid", "bf16", 128), ("sigmoid", "bf16", 256), ("sigmoid", "bf16", 1024), ("infonce", "fp32", 512)]
    made = [make(arch, *entry) for entry in grid for make in (_forward, _backward)]
    small = [(make, kind) for make in (_forward, _backward) for kind in ("infonce", "sigmoid")]
    small_cases = [make("sm_120", kind, "bf16", 256, ".small") for make, kind in small]
    small_cases += [make("sm_120", "infonce", "fp16", 256, ".small") for make in (_forward, _backward)]
    return made if arch.startswith("gfx") else made + small_cases


def _forward(arch: str, kind: str, dtype: str, size: int, suffix: str = "") -> StaticCase:
    from trichord_kernels.ops.contrastive_loss_forward import _contrastive_forward_kernel as kernel
    from trichord_kernels.tables.contrastive_loss import forward_tile

    tile = forward_tile(arch, _torch_dtype(dtype), size)
    return _case(f"contrastive_fwd.{kind}.{size}.{dtype}{suffix}", kernel, tile, kind, dtype, size, is_forward=True)


def _backward(arch: str, kind: str, dtype: str, size: int, suffix: str = "") -> StaticCase:
    from trichord_kernels.ops.contrastive_loss_backward import _contrastive_backward_kernel as kernel
    from trichord_kernels.tables.contrastive_loss import backward_tile

    tile = backward_tile(arch, _torch_dtype(dtype), size)
    return _case(f"contrastive_bwd.{kind}.{size}.{dtype}{suffix}", kernel, tile, kind, dtype, size, is_forward=False)


def _case(name: str, kernel: Any, tile: Any, kind: str, dtype: str, size: int, is_forward: bool) -> StaticCase:
    """Contiguous or strided, 16-byte-aligned features: aligned pointers, plain i32 strides."""
    from trichord_kernels.ops.launch import STRIDE_UNIT

    constexprs = {
        "E": size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_E": tile.block_e,
        "STRIDE_UNIT": STRIDE_UNIT,
        "RESIDENT": tile.is_resident,
        "SIGMOID": kind == "sigmoid",
        "HAS_BIAS": kind == "sigmoid",
    }
    if is_forward:
        constexprs |= {"NUM_STAGES": tile.num_stages}
    else:
        has_y_part = kind == "infonce"
        constexprs |= {"BLOCK_OUT": tile.block_out, "HAS_X_PART": True, "HAS_Y_PART": has_y_part, "WANT_SCALARS": True}
    return StaticCase(
        name=name,
        kernel=kernel,
        signature={arg: _argument_type(arg, constexprs, dtype) for arg in kernel.arg_names},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        row_bytes=None,
        shared_bytes=0,
        is_forward=is_forward,
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")},
        matmul=True,
        flops_per_iteration=_loop_flops(tile, is_forward),
        report_only=dtype == "fp32",
    )


def _loop_flops(tile: Any, is_forward: bool) -> int:
    """Of the innermost loop: over candidates where features are held whole, else over blocks of features."""
    products = 1 if is_forward or not tile.is_resident else 2
    return 2 * products * tile.block_m * tile.block_n * tile.block_e


def _argument_type(arg: str, constexprs: dict[str, Any], dtype: str) -> str:
    if arg in constexprs:
        return "constexpr"
    if arg in ("X_ptr", "Y_ptr"):
        return f"*{dtype}"
    if arg.endswith(("ids_ptr", "facts_ptr")):
        return "*i32"
    return "*fp32" if arg.endswith("_ptr") else "i32"


def _torch_dtype(name: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
