"""Tiles of merge_embeddings: rows per program (block_m) x columns per step (block_n)."""

from __future__ import annotations

from trichord_kernels.tables.tile import Tile

_SOURCE = "static: four 128-bit accesses per thread and step, no spill, occupancy 1.0"

# {arch: {bytes per element: tile}}. An architecture that is not listed takes sm_80's.
TABLE = {
    "cpu": {2: Tile(4, 32, 1, 1, "interpreter"), 4: Tile(4, 32, 1, 1, "interpreter")},
    "sm_80": {2: Tile(4, 1024, 4, 1, _SOURCE), 4: Tile(4, 512, 4, 1, _SOURCE)},
}


def tile_for(arch: str, item_bytes: int) -> Tile:
    return TABLE.get(arch, TABLE["sm_80"])[item_bytes]
