"""Tiles of rope: block_m rows (one head of one token each) x block_n column pairs. A thread holds the pairs that one
128-bit access per half of a row brings: 8 in half precision, 4 in float32."""

from __future__ import annotations

from trichord_kernels.tables.lookup import choose
from trichord_kernels.tables.tile import Tile

_STATIC = "static: 128-bit accesses, no spills, forward occupancy of at least 0.5"
# On 4 warps, 8 rows of 128 pairs move cos and sin through shared memory and take 71 registers with head norms.
_WIDE = "static: as the narrower ones, which 8 rows on 4 warps do not reach"
_SMALL = "interpreter: several tiles in a small test"

# (architecture, bytes per element, pairs of a head)
TABLE = {
    ("sm_80", 2, 16): Tile(64, 16, 4, 1, _STATIC),
    ("sm_80", 2, 32): Tile(32, 32, 4, 1, _STATIC),
    ("sm_80", 2, 64): Tile(16, 64, 4, 1, _STATIC),
    ("sm_80", 2, 128): Tile(16, 128, 8, 1, _WIDE),
    ("sm_80", 4, 16): Tile(32, 16, 4, 1, _STATIC),
    ("sm_80", 4, 32): Tile(16, 32, 4, 1, _STATIC),
    ("sm_80", 4, 64): Tile(8, 64, 4, 1, _STATIC),
    ("sm_80", 4, 128): Tile(8, 128, 8, 1, _WIDE),
    ("gfx90a", 2, 16): Tile(128, 16, 4, 1, _STATIC),
    ("gfx90a", 2, 32): Tile(64, 32, 4, 1, _STATIC),
    ("gfx90a", 2, 64): Tile(32, 64, 4, 1, _STATIC),
    ("gfx90a", 2, 128): Tile(16, 128, 4, 1, _STATIC),
    ("gfx90a", 4, 16): Tile(64, 16, 4, 1, _STATIC),
    ("gfx90a", 4, 32): Tile(32, 32, 4, 1, _STATIC),
    ("gfx90a", 4, 64): Tile(16, 64, 4, 1, _STATIC),
    ("gfx90a", 4, 128): Tile(8, 128, 4, 1, _STATIC),
    **{("cpu", size, pairs): Tile(16, pairs, 4, 1, _SMALL) for size in (2, 4) for pairs in (16, 32, 64, 128)},
}


def tile_for(arch: str, item_bytes: int, num_pairs: int) -> Tile:
    """The tile for heads of up to `num_pairs` pairs, at most 128."""
    return choose(TABLE, arch, item_bytes, next(listed for listed in (16, 32, 64, 128) if num_pairs <= listed))
