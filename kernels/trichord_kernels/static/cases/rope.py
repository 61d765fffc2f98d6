"""Rope over q and k, as its launcher launches it."""

from __future__ import annotations

from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase

THREE_AXES = (24, 20, 20)  # Qwen3-VL's at H = 128
ODD_WIDTH = 80  # its halves are a multiple of 8 but not of 16 elements


def cases(arch: str) -> list[StaticCase]:
    """32 query and 8 kv heads of 128 in bf16 are the default; the others vary head dim, axes, dtype and the share of
    the head that turns. Names: `<q heads>q<kv heads>k<head dim>`, `.norm` with head norms."""
    grid: list[dict[str, Any]] = [{"head_dim": head_dim} for head_dim in (64, ODD_WIDTH, 96, 128, 256)]
    grid += [{"head_dim": 128, "num_heads": (28, 4), "axes": True}, {"head_dim": 128, "num_frequencies": 32}]
    grid += [{"head_dim": 128, "num_heads": (6, 1)}, {"head_dim": 128, "dtype": "fp16"}]
    found = [
        make(arch, **variant, has_norm=has_norm)
        for variant in grid
        for make in (_rope_forward, _rope_backward)
        for has_norm in (False, True)
    ]
    # Without norms the assembler unrolls the float32 loop by four: the bytes of a tile would be counted four times.
    return found + [make(arch, head_dim=128, dtype="fp32", has_norm=True) for make in (_rope_forward, _rope_backward)]


def _rope_forward(arch: str, **variant: Any) -> StaticCase:
    from trichord_kernels.ops.rope_kernels import _rope_forward_kernel

    return _rope_case(arch, "rope_fwd", _rope_forward_kernel, is_forward=True, **variant)


def _rope_backward(arch: str, **variant: Any) -> StaticCase:
    from trichord_kernels.ops.rope_kernels import _rope_backward_kernel

    return _rope_case(arch, "rope_bwd", _rope_backward_kernel, is_forward=False, **variant)


def _rope_case(
    arch: str,
    name: str,
    kernel: Any,
    is_forward: bool,
    head_dim: int,
    has_norm: bool,
    num_heads: tuple[int, int] = (32, 8),
    axes: bool = False,
    num_frequencies: int | None = None,
    dtype: str = "bf16",
) -> StaticCase:
    """Aligned pointers, plain i32 strides. A tile's bytes are those of one step over q's heads and one over k's."""
    from trichord_kernels.ops.launch import STRIDE_UNIT
    from trichord_kernels.ops.rope import deal_axes, launch_shape

    sizes, num_warps = launch_shape(arch, ITEM_BYTES[dtype], head_dim, num_frequencies or head_dim // 2, num_heads)
    constexprs = {
        **sizes,
        "DEAL": tuple(deal_axes(THREE_AXES if axes else None, "interleaved")),
        "STRIDE_UNIT": STRIDE_UNIT,
        "HAS_Q_WEIGHT": has_norm,
        "HAS_K_WEIGHT": has_norm,
    }
    if not is_forward:
        constexprs |= {"HAS_GRAD_Q_WEIGHT": has_norm, "HAS_GRAD_K_WEIGHT": has_norm}
    row_operands = 3 if has_norm and not is_forward else 2  # read and write; the norm's backward reads x, too
    variant = f"{num_heads[0]}q{num_heads[1]}k{head_dim}" + (".3axes" if axes else "") + (".norm" if has_norm else "")
    return StaticCase(
        name=f"{name}.{variant}" + (f".{2 * num_frequencies}turn" if num_frequencies else "") + f".{dtype}",
        kernel=kernel,
        signature={arg: _argument_type(arg, constexprs, dtype) for arg in kernel.arg_names},
        constexprs=constexprs,
        num_warps=num_warps,
        row_bytes=2 * row_operands * sizes["BLOCK_ROWS"] * 2 * sizes["BLOCK_PAIRS"] * ITEM_BYTES[dtype],
        shared_bytes=0,
        is_forward=is_forward,
        needs_odd_width=head_dim == ODD_WIDTH,
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")},
    )


def _argument_type(arg: str, constexprs: dict[str, Any], dtype: str) -> str:
    if arg in constexprs:
        return "constexpr"
    if arg == "Inv_freq_ptr" or arg.endswith("_partial_ptr"):
        return "*fp32"
    if arg.endswith("_ptr"):
        return "*i64" if arg == "Position_ptr" else f"*{dtype}"
    return "fp32" if arg in ("eps", "scaling") else "i32"
