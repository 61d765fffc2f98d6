"""Tiles of fuse_modalities: rows (block_m) x columns (block_n) that a program holds at a time; the row kernels hold
whole rows. Every choice comes from compiled code (`trichord bench kernels --static`), none is timed."""

from __future__ import annotations

from trichord_kernels.tables.tile import Tile

_ROW_SOURCE = "static: 16 elements per thread, no spill; occupancy of at least 0.5 in the forward"
_WEIGHTS_SOURCE = "static: 8 elements per thread, no spill with the sums of 8 inputs"

# Float32 registers per column that the backward has beside its working set: for the weights' sums, for the inputs it
# keeps where it mixes again, and one for wider elements. With more per thread, or with more of them over wide rows, it
# spills (4 sums of 8192 columns: 96 bytes in the loop on sm_90; 3 in float32: 40 bytes on sm_100).
_MAX_REGISTERS = 6
_MAX_REGISTERS_X_WIDTH = 3 * 8192


def row_tile(arch: str, width: int) -> Tile:
    block_d = 1 << (width - 1).bit_length()
    block_rows = max(1, 1024 // block_d)
    return Tile(block_rows, block_d, max(2, block_rows * block_d // 512), 1, _ROW_SOURCE)


def weights_tile(arch: str) -> Tile:
    return Tile(16, 32, 4, 1, "interpreter") if arch == "cpu" else Tile(2, 512, 4, 1, _WEIGHTS_SOURCE)


def sums_fit_registers(width: int, num_sums: int, num_kept: int, item_bytes: int) -> bool:
    """Whether the backward's one pass makes the weights' sums; else a second kernel does.

    num_kept: inputs held from the second mixing on; item_bytes: of their elements.
    """
    registers = num_sums + -(-num_kept * item_bytes // 4) + (item_bytes > 2)
    return registers <= _MAX_REGISTERS and registers * (1 << (width - 1).bit_length()) <= _MAX_REGISTERS_X_WIDTH
