"""What Muon's matrices cost on the wire: each is brought together on one rank, and its update handed back.

From stage 1 on, as `engine/matrices.py` does it: stages 1 and 2 cut the line of all matrices into one range per rank,
so that only those on a border travel; stage 3 cuts every matrix. Workers take turns among the ranks with a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from trichord.planning.zero import Parameter, Zero

Pieces = list[tuple[int, int]]  # (rank, elements) of a matrix


def muon_exchange(parameters: Sequence[Parameter], zero: Zero, rank: int | None = None) -> tuple[int, int]:
    """(bytes that a rank puts in, messages) per step; rank None: the one with the most."""
    sizes = [p.numel for p in parameters if p.trainable and p.is_hidden]
    if not zero.muon or not zero.stage or not sizes:
        return 0, 0
    put, shared = np.zeros(zero.ranks, dtype=np.int64), 0
    for numel, pieces in zip(sizes, _pieces(sizes, zero)):
        if len(pieces) < 2:
            continue
        for owner, length in pieces:
            put[owner] += length
        put[pieces[shared % len(pieces)][0]] += numel  # the worker hands the whole update back
        shared += 1
    item = 4 if zero.weight_bytes == 4 and not zero.autocast else 2
    return item * int(put.max() if rank is None else put[rank]), 2 * math.ceil(shared / zero.ranks)


def _pieces(sizes: Sequence[int], zero: Zero) -> Iterator[Pieces]:
    if zero.stage == 3:
        yield from (_cut(0, numel, -(-numel // zero.ranks)) for numel in sizes)
        return
    align, offset = 2 * zero.ranks, 0  # DeepSpeed fills the line up to this many elements
    part = -(-sum(sizes) // align) * align // zero.ranks
    for numel in sizes:
        yield _cut(offset, numel, part)
        offset += numel


def _cut(offset: int, numel: int, part: int) -> Pieces:
    ranks = range(offset // part, -(-(offset + numel) // part))
    return [(r, min(offset + numel, (r + 1) * part) - max(offset, r * part)) for r in ranks]
