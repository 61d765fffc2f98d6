"""The attention kernels, as their launchers launch them.

Causal, window, whole-segment and cross masks are one compilation (`rows`: bounds come as integers); `spans` adds the
two integers per token. `.small` is the entry for parts with 99 KiB of shared memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trichord_kernels.static.case import ITEM_BYTES, StaticCase

HEAD_DIMS = (64, 80, 96, 128, 256)
SMALL_ESTIMATE_KIB = 70  # tiles alone; layouts of sm_100 take up to 40 % more, and the bar is at 99


def cases(arch: str) -> list[StaticCase]:
    """bf16 with spans at every head dim; the other variants at 128, and 256 is reported only."""
    found = [
        case
        for head_dim in HEAD_DIMS
        for kernel in _KERNELS
        for case in _with_small(arch, kernel, head_dim, spans=True)
    ]
    for kernel in _KERNELS:
        found += _with_small(arch, kernel, 128)
        found += _with_small(arch, kernel, 128, used=True)
        found += _with_small(arch, kernel, 128, spans=True, softcap=True)
        found += _with_small(arch, kernel, 64, spans=True, dtype="fp16")
        found.append(_case(arch, kernel, 64, dtype="fp32"))
    return [*found, *_with_small(arch, "fwd", 128, gated=True), _gate_backward(128)]


_KERNELS = ("fwd", "dq", "dkdv")


def _with_small(arch: str, kernel: str, head_dim: int, **variant: Any) -> list[StaticCase]:
    """The case, and the `small` entry's: on sm_80 wherever it differs, else where bar 6 may ask for it."""
    case = _case(arch, kernel, head_dim, **variant)
    if arch.startswith("gfx"):
        return [case]
    small = _case("small", kernel, head_dim, **variant)
    if arch == "sm_80":
        return [case] if _tile(case) == _tile(small) else [case, small]
    block_m, block_n, _, num_stages = _tile(case)
    resident, streamed, operands = {"fwd": (block_m, block_n, 1), "dq": (block_m, block_n, 2)}.get(
        kernel, (block_n, block_m, 2)
    )
    columns = case.constexprs["MAIN"] + case.constexprs["TAIL"]
    kib = 2 * columns * (operands * resident + 2 * streamed * num_stages) / 1024
    # The parts that take the small entry have sm_80's tensor cores: there it is held to the bars.
    return [case] if kib <= SMALL_ESTIMATE_KIB else [case, replace(small, report_only=True)]


def _tile(case: StaticCase) -> tuple[int, int, int, int]:
    return case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"], case.num_warps, case.num_stages or 1


def _case(
    arch: str,
    kernel: str,
    head_dim: int,
    *,
    spans: bool = False,
    used: bool = False,
    softcap: bool = False,
    gated: bool = False,
    dtype: str = "bf16",
) -> StaticCase:
    from trichord_kernels.ops import attention_backward, attention_forward
    from trichord_kernels.ops.attention_tiles import split_head_dim
    from trichord_kernels.ops.launch import STRIDE_UNIT
    from trichord_kernels.tables import attention as tables

    table, jitted, num_dots = {
        "fwd": (tables.FORWARD, attention_forward.attention_forward_kernel, 2),
        "dq": (tables.DQ, attention_backward.attention_dq_kernel, 3),
        "dkdv": (tables.DKDV, attention_backward.attention_dkdv_kernel, 4),
    }[kernel]
    main, tail = split_head_dim(head_dim)
    tile = tables.tile_for(table, arch, main + tail, ITEM_BYTES[dtype])
    constexprs = {"H": head_dim, "MAIN": main, "TAIL": tail, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constexprs |= {"STRIDE_UNIT": STRIDE_UNIT, "EDGE_STAGES": tables.edge_stages(tile), "SOFTCAP": softcap}
    absent = {"Span_begins_ptr": not spans, "Span_ends_ptr": not spans, "Used_k_ptr": not used}
    if kernel == "fwd":
        constexprs["GATE_PER_HEAD"] = gated
        absent |= {"Hidden_ptr": not gated, "Gate_ptr": not gated, "Gated_ptr": not gated}
    constexprs |= {name: None for name, is_absent in absent.items() if is_absent}
    kind = "spans" if spans else "rows"
    words = [word for word, said in (("used", used), ("softcap", softcap), ("gated", gated)) if said]
    name = ".".join([f"attention_{kernel}", str(head_dim), kind, *words, dtype] + ["small"] * (arch == "small"))
    return StaticCase(
        name=name,
        kernel=jitted,
        signature=_signature(jitted, constexprs, dtype),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        row_bytes=None,
        shared_bytes=0,
        is_forward=kernel == "fwd",
        matmul=dtype != "fp32",  # exact float32 products run without tensor cores
        flops_per_iteration=2 * num_dots * tile.block_m * tile.block_n * head_dim,
        head_dim=head_dim if dtype != "fp32" else None,
        report_only=head_dim == 256 or dtype == "fp32",
        attrs=_aligned_pointers(jitted, constexprs),
    )


def _gate_backward(head_dim: int) -> StaticCase:
    from trichord_kernels.ops import gated_cross_attention as op

    constexprs = {"H": head_dim, "BLOCK_ROWS": op.GATE_TILE_ELEMENTS // head_dim, "BLOCK_H": head_dim}
    constexprs["GATE_PER_HEAD"] = True
    jitted = op.gate_backward_kernel
    return StaticCase(
        name=f"gate_bwd.{head_dim}.bf16",
        kernel=jitted,
        signature=_signature(jitted, constexprs, "bf16"),
        constexprs=constexprs,
        num_warps=4,
        row_bytes=None,
        shared_bytes=0,
        is_forward=False,
        report_only=True,  # one lse per row beside 128-bit rows: narrow loads by nature
        attrs=_aligned_pointers(jitted, constexprs),
    )


_FLOAT32 = ("Lse_ptr", "Delta_ptr", "Share_ptr", "Gate_ptr")
_INT32 = ("Cu_q_ptr", "Cu_k_ptr", "Used_k_ptr", "Span_begins_ptr", "Span_ends_ptr")


def _signature(kernel: Any, constexprs: dict[str, Any], dtype: str) -> dict[str, str]:
    return {name: "constexpr" if name in constexprs else _argument_type(name, dtype) for name in kernel.arg_names}


def _argument_type(name: str, dtype: str) -> str:
    if name in _FLOAT32:
        return "*fp32"
    if name in _INT32:
        return "*i32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name.endswith("_scale") else "i32"


def _aligned_pointers(kernel: Any, constexprs: dict[str, Any]) -> dict[tuple[int, ...], list]:
    names = enumerate(kernel.arg_names)
    return {(i,): [["tt.divisibility", 16]] for i, n in names if n.endswith("_ptr") and n not in constexprs}
