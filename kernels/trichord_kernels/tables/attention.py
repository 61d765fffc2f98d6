"""Tiles of the attention kernels: block_m queries x block_n keys, by (architecture, columns of a head, item bytes).

The mask kind is no key: intervals are bounds of loops, so every kind runs the same full-tile loop. float32 multiplies
without tensor cores (exact products) and holds small tiles. `choose` gives parts with 99 KiB of shared memory the
`small` entries.
"""

from __future__ import annotations

from trichord_kernels.tables.lookup import choose
from trichord_kernels.tables.tile import Tile

HEAD_COLUMNS = (64, 80, 96, 128, 256)  # a head takes the entry of the least one that holds its columns
_STATIC = "static: tensor cores, no spills in the full-tile loop, fewest instructions per FLOP of those tried"
_TINY = Tile(32, 32, 4, 1, "small, so that tests under the interpreter see several tiles")
_FLOAT32 = Tile(32, 32, 8, 1, "static: exact products run on no tensor core; no spills at head dim 64")
_AMD = Tile(64, 32, 4, 1, "static: fits 64 KiB")

FORWARD: dict[tuple, Tile] = {
    **{("cpu", columns, item_bytes): _TINY for columns in HEAD_COLUMNS for item_bytes in (2, 4)},
    **{(arch, columns, 4): _FLOAT32 for arch in ("sm_80", "gfx942", "small") for columns in HEAD_COLUMNS},
    **{("gfx942", columns, 2): _AMD for columns in HEAD_COLUMNS},
    ("sm_80", 64, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_80", 80, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_80", 96, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_80", 128, 2): Tile(128, 32, 8, 3, _STATIC),
    ("sm_80", 256, 2): Tile(64, 32, 8, 2, _STATIC),
    ("sm_90", 64, 2): Tile(128, 128, 8, 3, _STATIC),
    ("sm_90", 80, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_90", 96, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_90", 128, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_90", 256, 2): Tile(128, 32, 8, 2, _STATIC),
    ("sm_100", 64, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_100", 80, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_100", 96, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_100", 128, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_100", 256, 2): Tile(128, 64, 8, 2, _STATIC),
    ("small", 64, 2): Tile(128, 64, 8, 2, _STATIC),
    ("small", 80, 2): Tile(128, 64, 8, 2, _STATIC),
    ("small", 96, 2): Tile(128, 64, 8, 2, _STATIC),
    ("small", 128, 2): Tile(128, 32, 8, 3, _STATIC),
    ("small", 256, 2): Tile(64, 32, 8, 1, _STATIC),
}
DQ: dict[tuple, Tile] = {
    **{("cpu", columns, item_bytes): _TINY for columns in HEAD_COLUMNS for item_bytes in (2, 4)},
    **{(arch, columns, 4): _FLOAT32 for arch in ("sm_80", "gfx942", "small") for columns in HEAD_COLUMNS},
    **{("gfx942", columns, 2): _AMD for columns in HEAD_COLUMNS},
    ("sm_80", 64, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_80", 80, 2): Tile(128, 32, 8, 2, _STATIC),
    ("sm_80", 96, 2): Tile(128, 32, 8, 2, _STATIC),
    ("sm_80", 128, 2): Tile(64, 64, 8, 2, _STATIC),
    ("sm_80", 256, 2): Tile(64, 32, 8, 1, _STATIC),
    ("sm_90", 64, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_90", 80, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_90", 96, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_90", 128, 2): Tile(128, 64, 8, 3, _STATIC),
    ("sm_90", 256, 2): Tile(64, 32, 8, 2, _STATIC),
    ("sm_100", 64, 2): Tile(128, 128, 8, 2, _STATIC),
    ("sm_100", 80, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_100", 96, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_100", 128, 2): Tile(128, 64, 8, 2, _STATIC),
    ("sm_100", 256, 2): Tile(64, 32, 8, 2, _STATIC),
    ("small", 64, 2): Tile(128, 64, 8, 2, _STATIC),
    ("small", 80, 2): Tile(128, 32, 8, 2, _STATIC),
    ("small", 96, 2): Tile(128, 32, 8, 2, _STATIC),
    ("small", 128, 2): Tile(64, 32, 4, 2, _STATIC),
    ("small", 256, 2): Tile(32, 32, 4, 1, _STATIC),
}
DKDV: dict[tuple, Tile] = {
    **{("cpu", columns, item_bytes): _TINY for columns in HEAD_COLUMNS for item_bytes in (2, 4)},
    **{(arch, columns, 4): _FLOAT32 for arch in ("sm_80", "gfx942", "small") for columns in HEAD_COLUMNS},
    **{("gfx942", columns, 2): _AMD for columns in HEAD_COLUMNS},
    ("sm_80", 64, 2): Tile(32, 128, 8, 2, _STATIC),
    ("sm_80", 80, 2): Tile(32, 128, 8, 2, _STATIC),
    ("sm_80", 96, 2): Tile(32, 64, 4, 2, _STATIC),
    ("sm_80", 128, 2): Tile(64, 64, 8, 2, _STATIC),
    ("sm_80", 256, 2): Tile(32, 64, 8, 1, _STATIC),
    ("sm_90", 64, 2): Tile(64, 128, 8, 3, _STATIC),
    ("sm_90", 80, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_90", 96, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_90", 128, 2): Tile(32, 128, 8, 3, _STATIC),
    ("sm_90", 256, 2): Tile(32, 64, 8, 2, _STATIC),
    ("sm_100", 64, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_100", 80, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_100", 96, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_100", 128, 2): Tile(64, 128, 8, 2, _STATIC),
    ("sm_100", 256, 2): Tile(32, 64, 8, 2, _STATIC),
    ("small", 64, 2): Tile(32, 128, 8, 2, _STATIC),
    ("small", 80, 2): Tile(32, 128, 8, 2, _STATIC),
    ("small", 96, 2): Tile(32, 64, 4, 2, _STATIC),
    ("small", 128, 2): Tile(32, 64, 8, 2, _STATIC),
    ("small", 256, 2): Tile(32, 32, 8, 1, _STATIC),
}


def tile_for(table: dict[tuple, Tile], arch: str, columns: int, item_bytes: int) -> Tile:
    """The tile for heads held as `columns` columns (MAIN + TAIL, at most 256) of items of 2 or 4 bytes."""
    return choose(table, arch, min(listed for listed in HEAD_COLUMNS if listed >= columns), item_bytes)


def edge_stages(tile: Tile) -> int:
    """Pipeline stages of the loops over a tile's masked edges: there are few of them, and stages cost registers."""
    return 1 if tile.block_m * tile.block_n >= 128 * 128 else 2
