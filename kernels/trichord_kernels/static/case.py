"""One ahead-of-time compilation that the static judge makes, and what its machine code may touch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StaticCase:
    """One ahead-of-time compilation and what its machine code may touch.

    name: `<kernel>.<variant>...`; the part before the first dot is the kernel's name in every row. A matmul case whose
    shared memory exceeds 99 KiB needs a twin of the same name + `.small` that does not (bar 6).
    row_bytes: bytes of row operands one program must read and write per tile (the algorithm's minimum, counted from
    the signature); None: bar 8 does not apply. shared_bytes: bytes of a tile's operand shared by all rows (the weight),
    which threads of every row read again from cache; 0 where it is read before the loop.
    num_warps, num_stages: as the launcher gives them to the compiler; None leaves the compiler's default.
    matmul: a tensor-core kernel: bars 3 and 7, and the hot part is its full-tile loop (of the innermost loops with
    tensor-core instructions the one with the fewest instructions).
    flops_per_iteration: of one iteration of the full-tile loop of one program, 2 per multiply-add, as written (the
    compiler may unroll: say what one pass of the Python loop does); for the serial bound.
    head_dim: for attention kernels, the baseline figures of which are printed beside them.
    report_only: printed and never failed (head dim 256).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    row_bytes: int | None
    shared_bytes: int
    is_forward: bool
    needs_odd_width: bool = False  # rows of a multiple of 8 but not 16 elements, strides passed (bar 5)
    attrs: dict[tuple[int, ...], list] = field(default_factory=dict)
    num_stages: int | None = None
    matmul: bool = False
    flops_per_iteration: int | None = None
    head_dim: int | None = None
    report_only: bool = False
