"""Modality fusion, as its launchers launch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase

_FP32_POINTERS = ("Scalars_ptr", "Table_ptr", "Grad_table_ptr", "Partial_ptr")
_TABLE_BYTES = 16  # of factors or scalars, which every thread of a row reads again from cache


@dataclass(frozen=True)
class Variant:
    """One way to call the op. factors: scalar, channel or gated. kept: what is there of attended, residual, norm."""

    num_inputs: int
    factors: str
    width: int
    dtype: str = "bf16"
    norm: str = "rms"
    has_attended: bool = True
    has_residual: bool = True

    @property
    def name(self) -> str:
        operands = "".join(("a" if self.has_attended else "", "r" if self.has_residual else "")) or "bare"
        return f"{self.factors}{self.num_inputs}.{operands}.{self.norm}.{self.width}.{self.dtype}"

    @property
    def has_norm(self) -> bool:
        return self.norm != "none"

    @property
    def num_weights(self) -> int:
        return 0 if self.factors == "gated" else self.num_inputs

    @property
    def num_norm_weights(self) -> int:
        return {"none": 0, "rms": 1, "layer": 2}[self.norm]


def cases(arch: str) -> list[StaticCase]:
    """z = w1*x + w2*y + Att(x, y) with residual and norm at four widths, gates, three inputs, and the other paths."""
    variants = [Variant(2, factors, width) for factors in ("scalar", "channel") for width in (1024, 4096, 4104, 8192)]
    variants += [Variant(2, "gated", width, has_attended=False) for width in (1024, 4096, 4104, 8192)]
    variants += [Variant(3, factors, width) for factors in ("channel", "gated") for width in (4096, 8192)]
    variants += [
        Variant(2, "channel", 4096, norm="layer"),
        *(Variant(2, "channel", width, dtype="fp32") for width in (4096, 8192)),
    ]
    variants += [Variant(2, "channel", width, has_residual=False) for width in (4096, 8192)]
    variants += [Variant(2, "channel", 4096, norm="none", has_attended=False, has_residual=False)]
    both = [make(arch, variant) for variant in variants for make in (_forward, _backward)]
    return [*both, *(_weights_backward(arch, Variant(n, "channel", width)) for n, width in ((3, 8192), (8, 4104)))]


def _constexprs(variant: Variant, tile: Any) -> dict[str, Any]:
    from trichord_kernels.ops import fuse_modalities_forward as op
    from trichord_kernels.ops.launch import STRIDE_UNIT

    return {
        "N": variant.num_inputs,
        "D": variant.width,
        "BLOCK_ROWS": tile.block_m,
        "BLOCK_D": tile.block_n,
        "STRIDE_UNIT": STRIDE_UNIT,
        "TABLE_N": -(-variant.num_inputs // op.TABLE_UNIT) * op.TABLE_UNIT,
        "MIX": op.MIX_GATED if variant.factors == "gated" else op.MIX_FIXED,
        "HAS_WEIGHTS": variant.num_weights > 0,
        "HAS_SCALARS": variant.factors == "scalar",
        "CHANNEL_BITS": (1 << variant.num_inputs) - 1 if variant.factors == "channel" else 0,
        "NORM": op.NORM_CODES[variant.norm],
        "HAS_ATTENDED": variant.has_attended,
    }


def _forward(arch: str, variant: Variant) -> StaticCase:
    from trichord_kernels.ops import fuse_modalities_forward as op
    from trichord_kernels.tables.fuse_modalities import row_tile

    tile = row_tile(arch, variant.width)
    flags = {"HAS_RESIDUAL": variant.has_residual, "HAS_NORM_BIAS": variant.norm == "layer"}
    passes = variant.num_inputs + variant.has_attended + variant.has_residual
    passes += variant.has_norm + (variant.has_residual or not variant.has_norm)
    shared_rows = (variant.factors == "channel") * variant.num_inputs + variant.num_norm_weights
    return _case("fwd", op._fuse_modalities_forward_kernel, variant, tile, flags, passes, shared_rows)


def _backward(arch: str, variant: Variant) -> StaticCase:
    from trichord_kernels.ops import fuse_modalities_backward as op
    from trichord_kernels.tables.fuse_modalities import row_tile, sums_fit_registers

    tile = row_tile(arch, variant.width)
    mixes_again = variant.has_norm and not variant.has_residual
    num_sums, num_kept = variant.num_weights + variant.num_norm_weights, mixes_again * variant.num_inputs
    sums_fit = sums_fit_registers(variant.width, num_sums, num_kept, ITEM_BYTES[variant.dtype])
    grads_weights, is_gated = variant.num_weights > 0 and sums_fit, variant.factors == "gated"
    grads_z = variant.has_norm and (variant.has_attended or variant.has_residual)
    flags = {
        "BLOCK_TABLE": tile.block_n // 4,
        "HAS_H": variant.has_norm and variant.has_residual,
        "HAS_ATTENDED": mixes_again and variant.has_attended,
        "HAS_GRAD_H": variant.has_norm and variant.has_residual,
        "GRAD_X_BITS": (1 << variant.num_inputs) - 1,
        "GRAD_WEIGHTS": grads_weights,
        "GRAD_TABLE": is_gated,
        "GRAD_Z": grads_z,
        "GRAD_NORM": variant.has_norm,
        "GRAD_BIAS": variant.norm == "layer",
    }
    reads = 1 + flags["HAS_H"] + flags["HAS_GRAD_H"] + flags["HAS_ATTENDED"]
    reads += variant.num_inputs * (mixes_again or grads_weights or is_gated)
    # Weights, the norm's too, are read inside the loop: kept in registers they would displace the sums.
    shared_rows = (variant.factors == "channel") * variant.num_inputs * (1 + mixes_again) + variant.has_norm
    passes = reads + variant.num_inputs + grads_z
    return _case("bwd", op._fuse_modalities_backward_kernel, variant, tile, flags, passes, shared_rows)


def _weights_backward(arch: str, variant: Variant) -> StaticCase:
    from trichord_kernels.ops import fuse_modalities_backward as op
    from trichord_kernels.tables.fuse_modalities import weights_tile

    kernel = op._fuse_weights_backward_kernel
    return _case("weights_bwd", kernel, variant, weights_tile(arch), {}, 1 + variant.num_inputs, 0)


def _case(
    direction: str, kernel: Any, variant: Variant, tile: Any, flags: dict[str, Any], passes: int, shared_rows: int
) -> StaticCase:
    """passes: row operands read and written once; shared_rows: weights (D,) that the rows of a tile share."""
    known = _constexprs(variant, tile) | flags
    constexprs = {arg: known[arg] for arg in kernel.arg_names if arg in known}
    signature: dict[str, Any] = {arg: _argument_type(arg, constexprs, variant) for arg in kernel.arg_names}
    tile_bytes = tile.block_m * tile.block_n * ITEM_BYTES[variant.dtype]
    # The factors' row, and the gradient that goes back into it.
    table_bytes = 2 * _TABLE_BYTES * constexprs["TABLE_N"] // 4 * 32 * tile.num_warps
    return StaticCase(
        name=f"fuse_modalities_{direction}.{variant.name}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        row_bytes=passes * tile_bytes,
        shared_bytes=shared_rows * tile_bytes + (0 if variant.factors == "channel" else table_bytes),
        is_forward=direction == "fwd",
        needs_odd_width=variant.width % 8 == 0 and variant.width % 16 != 0,
        attrs=_aligned(kernel, signature),
    )


def _argument_type(arg: str, constexprs: dict[str, Any], variant: Variant) -> Any:
    if arg in constexprs:
        return "constexpr"
    if arg in _FP32_POINTERS:
        return "*fp32"
    if arg == "W_ptrs":
        return (f"*{variant.dtype}",) * variant.num_weights
    if arg.endswith("_ptrs"):
        return (f"*{variant.dtype}",) * variant.num_inputs
    if arg == "X_row_strides":
        return ("i32",) * variant.num_inputs
    return f"*{variant.dtype}" if arg.endswith("_ptr") else "fp32" if arg == "eps" else "i32"


def _aligned(kernel: Any, signature: dict[str, Any]) -> dict[tuple[int, ...], list]:
    """16-byte alignment of every pointer, those in tuples too."""
    paths: list[tuple[int, ...]] = []
    for i, arg in enumerate(kernel.arg_names):
        if arg.endswith("_ptr"):
            paths.append((i,))
        elif arg.endswith("_ptrs"):
            paths += [(i, j) for j in range(len(signature[arg]))]
    return {path: [["tt.divisibility", 16]] for path in paths}
