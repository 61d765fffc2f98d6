"""contrastive_loss: rows x candidates that a program holds at a time, and how features and candidates are cut up.

Features of up to 256 half-precision numbers are held whole ("resident"): a tile of candidates is read once and serves
both products of the backward. Longer ones, and float32, are read in blocks for every tile, and a program of the
backward makes `block_out` of the E features of a gradient, so the logits are computed again E / block_out times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trichord_kernels.tables.lookup import choose
from trichord_kernels.tables.tile import Tile

# Programs a launch is cut into by sharing out the candidates, where the rows give fewer. A function of the sizes only,
# so that sums have the same order on every GPU of an architecture; 264 are 2 per SM on an H100. Where rows alone give
# fewer, the partial gradients of the backward are this many tiles of block_m x block_out float32: at most 33 MiB.
PROGRAMS = 264

# (arch, precision of the features, features held at a time; 0: read in blocks): rows x candidates
FORWARD: dict[tuple, Tile] = {
    ("cpu", "half", 32): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "half", 0): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "single", 32): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "single", 0): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("sm_80", "half", 64): Tile(128, 64, 4, 3, "static: no spill, 35 KiB"),
    ("sm_80", "half", 128): Tile(128, 64, 4, 3, "static: no spill, 67 KiB"),
    ("sm_80", "half", 256): Tile(128, 64, 4, 2, "static: no spill, 98.5 KiB"),
    ("sm_80", "half", 0): Tile(128, 64, 4, 3, "static: no spill, 48 KiB"),
    ("sm_80", "single", 0): Tile(64, 64, 8, 2, "static: no spill, 16 KiB"),
    ("sm_90", "half", 256): Tile(128, 64, 4, 2, "static: no spill, serial bound 0.46"),
    ("small", "half", 256): Tile(128, 32, 4, 2, "static: no spill, 96 KiB"),
    ("sm_100", "half", 64): Tile(128, 32, 4, 3, "static: 64 candidates spill in the loop"),
    ("sm_100", "half", 128): Tile(128, 32, 4, 3, "static: 64 candidates spill in the loop"),
    ("gfx942", "half", 64): Tile(128, 64, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 128): Tile(64, 64, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 256): Tile(64, 32, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 0): Tile(128, 64, 4, 2, "static: compiles within 64 KiB"),
    ("gfx942", "single", 0): Tile(64, 64, 4, 2, "static: compiles within 64 KiB"),
}
# The same for the backward
BACKWARD: dict[tuple, Tile] = {
    ("cpu", "half", 32): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "half", 0): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "single", 32): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("cpu", "single", 0): Tile(32, 32, 1, 1, "interpreter: several tiles in short tests"),
    ("sm_80", "half", 64): Tile(64, 64, 4, 3, "static: no spill; 128 rows spill in the loop on sm_90"),
    ("sm_80", "half", 128): Tile(64, 64, 4, 3, "static: no spill, serial bound 0.55"),
    ("sm_80", "half", 256): Tile(64, 64, 8, 2, "static: no spill; 4 warps spill in the loop"),
    ("sm_80", "half", 0): Tile(64, 64, 8, 3, "static: no spill; 128 rows spill in the loop on sm_90"),
    ("sm_80", "single", 0): Tile(64, 32, 8, 2, "static: no spill; 64 candidates spill"),
    ("sm_90", "half", 128): Tile(128, 64, 8, 3, "static: no spill, serial bound 0.45"),
    ("sm_90", "half", 256): Tile(128, 32, 8, 2, "static: no spill; 64 rows at 8 warps make products twice"),
    ("sm_90", "single", 0): Tile(64, 64, 8, 2, "static: no spill"),
    ("sm_100", "half", 128): Tile(64, 64, 4, 3, "static: none in the loop; 128 rows take 99.03 KiB"),
    ("small", "half", 256): Tile(64, 32, 4, 2, "static: no spill, 80 KiB"),
    ("gfx942", "half", 64): Tile(64, 64, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 128): Tile(64, 64, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 256): Tile(64, 32, 4, 1, "static: compiles within 64 KiB"),
    ("gfx942", "half", 0): Tile(64, 64, 8, 1, "static: compiles within 64 KiB"),
    ("gfx942", "single", 0): Tile(64, 32, 8, 1, "static: compiles within 64 KiB"),
}


@dataclass(frozen=True)
class LaunchTile:
    """block_m rows x block_n candidates; block_e features read at a time, all of them where `is_resident`; block_out
    features of a gradient per program; warps and stages."""

    block_m: int
    block_n: int
    block_e: int
    block_out: int
    is_resident: bool
    num_warps: int
    num_stages: int


def forward_tile(arch: str, dtype: torch.dtype, num_features: int) -> LaunchTile:
    """The tile of the forward for features of this dtype and length E."""
    return _launch_tile(FORWARD, arch, dtype, num_features)


def backward_tile(arch: str, dtype: torch.dtype, num_features: int) -> LaunchTile:
    """The tile of the backward for features of this dtype and length E."""
    return _launch_tile(BACKWARD, arch, dtype, num_features)


def num_splits(programs: int, num_candidates: int, block_n: int) -> tuple[int, int]:
    """(splits, candidates per split, a multiple of block_n): what `programs` a split need to become PROGRAMS."""
    tiles = -(-num_candidates // block_n)
    wanted = max(1, min(tiles, PROGRAMS // programs))
    tiles_per_split = -(-tiles // wanted)
    return -(-tiles // tiles_per_split), tiles_per_split * block_n


def _launch_tile(table: dict[tuple, Tile], arch: str, dtype: torch.dtype, num_features: int) -> LaunchTile:
    precision = "single" if dtype == torch.float32 else "half"
    sizes = (32,) if arch == "cpu" else (64, 128, 256) if precision == "half" else ()
    size = next((size for size in sizes if num_features <= size), 0)
    tile = choose(table, arch, precision, size)
    block_e = size or _BLOCK_E[precision]
    block_out = size or (32 if arch == "cpu" else _BLOCK_OUT[precision])
    return LaunchTile(tile.block_m, tile.block_n, block_e, block_out, size > 0, tile.num_warps, tile.num_stages)


_BLOCK_E = {"half": 64, "single": 32}
_BLOCK_OUT = {"half": 256, "single": 128}
