"""linear_cross_entropy: tiles of its two row kernels, and how many rows of logits live at a time.

A tile is block_m lanes x block_n neighbouring columns of one row per lane; a lane's columns are 16 bytes on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from trichord_kernels.tables.lookup import choose
from trichord_kernels.tables.tile import Tile

_STATIC = "static: two 128-bit accesses per thread and turn, no spill, occupancy 1 at 128256"

# (arch, bytes per logit): lanes x columns, the same for forward and backward
TABLE: dict[tuple, Tile] = {
    ("cpu", 2): Tile(4, 8, 4, 1, "interpreter: several tiles in short tests"),
    ("cpu", 4): Tile(8, 4, 4, 1, "interpreter: several tiles in short tests"),
    ("sm_80", 2): Tile(512, 8, 8, 1, _STATIC),
    ("sm_80", 4): Tile(512, 4, 8, 1, _STATIC),
    ("gfx90a", 2): Tile(512, 8, 8, 1, _STATIC),
    ("gfx90a", 4): Tile(512, 4, 8, 1, _STATIC),
}


def row_tile(arch: str, item_bytes: int) -> Tile:
    return choose(TABLE, arch, item_bytes)


@dataclass(frozen=True)
class Chunk:
    """Logits that live at once: at most `num_bytes`, and at most `max_rows` rows of them."""

    num_bytes: int
    max_rows: int
    source: str


# More rows make the matrix products cheaper (each chunk reads the whole weight, and reads and writes its whole gradient
# in float32), fewer take less memory.
CPU_CHUNK = Chunk(2**26, 512, "timed on a CPU at T=8192, D=512, V=32768: more rows are not faster")
GPU_CHUNK = Chunk(2**29, 2048, "arithmetic: 2048 rows are 512 FLOPs per byte of float32 weight gradient moved")


def chunk_rows(arch: str, num_rows: int, row_bytes: int) -> int:
    """Rows per chunk (at least 1): as even as the limits allow, so that no short chunk is left over."""
    chunk = CPU_CHUNK if arch == "cpu" else GPU_CHUNK
    limit = max(1, min(chunk.max_rows, chunk.num_bytes // row_bytes))
    num_chunks = max(1, -(-num_rows // limit))
    return max(1, -(-num_rows // num_chunks))
