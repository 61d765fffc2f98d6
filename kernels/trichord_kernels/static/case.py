"""One ahead-of-time compilation that the static judge makes, and what its machine code may touch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StaticCase:
    """One ahead-of-time compilation and what its machine code may touch.

    row_bytes: bytes of row operands one program must read and write per tile (the algorithm's minimum, counted from
    the signature). shared_bytes: bytes of a tile's operand shared by all rows (the weight), which threads of every
    row read again from cache; 0 where it is read before the loop.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    row_bytes: int
    shared_bytes: int
    is_forward: bool
    needs_odd_width: bool = False  # rows of a multiple of 8 but not 16 elements, strides passed (bar 5)
    attrs: dict[tuple[int, ...], list] = field(default_factory=dict)
