"""Tiles of merge_embeddings: rows per program (block_m) x columns per step (block_n)."""

from __future__ import annotations

from trichord_kernels.tables.lookup import choose
from trichord_kernels.tables.tile import Tile

_SOURCE = "static: four 128-bit accesses per thread and step, no spill, occupancy 1.0"

# (arch, bytes per element)
TABLE: dict[tuple, Tile] = {
    ("cpu", 2): Tile(4, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", 4): Tile(4, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("sm_80", 2): Tile(4, 1024, 4, 1, _SOURCE),
    ("sm_80", 4): Tile(4, 512, 4, 1, _SOURCE),
    ("gfx90a", 2): Tile(4, 1024, 4, 1, _SOURCE),
    ("gfx90a", 4): Tile(4, 512, 4, 1, _SOURCE),
}


def tile_for(arch: str, item_bytes: int) -> Tile:
    return choose(TABLE, arch, item_bytes)
