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
_INTERPRETER = "small, so that tests see several tiles"
_FLOAT32 = "static: compiles without spills in the full-tile loop"

FORWARD: dict[tuple, Tile] = {
    ("cpu", columns, item_bytes): Tile(32, 32, 4, 1, _INTERPRETER) for columns in HEAD_COLUMNS for item_bytes in (2, 4)
}
DQ: dict[tuple, Tile] = dict(FORWARD)
DKDV: dict[tuple, Tile] = dict(FORWARD)


def tile_for(table: dict[tuple, Tile], arch: str, columns: int, item_bytes: int) -> Tile:
    """The tile for heads held as `columns` columns (MAIN + TAIL, at most 256) of items of 2 or 4 bytes."""
    return choose(table, arch, min(listed for listed in HEAD_COLUMNS if listed >= columns), item_bytes)
