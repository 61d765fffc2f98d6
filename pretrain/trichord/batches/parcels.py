"""Decoded rows on their way from one process to another.

All arrays of a row travel in a slot of shared memory that is used again and again (batches/slots.py), or, where it is
too large or none is free, in a block of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from trichord.batches.decoding import DecodedRow
from trichord.batches.rows import RowArrays
from trichord.batches.slots import RowSlots
from trichord.batches.windows import LeftOut

_ALIGNMENT = 64


@dataclass(frozen=True)
class Parcel:
    """A decoded row on its way. places: by name of the array, (offset, shape, dtype, whether it was in pieces) in
    `memory`: a slot's number, or a block."""

    places: dict[str, tuple[int, tuple[int, ...], str, bool]]
    size: int
    memory: int | torch.Tensor
    bad: tuple[LeftOut, ...]


def pack_parcel(row: DecodedRow, slots: RowSlots, slot: int | None) -> Parcel:
    """Copy the arrays of a row into the slot, or into a block where there is none or it is too small."""
    places, copies, size = {}, [], 0
    for name, value in vars(row.arrays).items():
        pieces = value if isinstance(value, tuple) else (value,)
        first = pieces[0]
        shape = (sum(map(len, pieces)), *first.shape[1:])
        end = size + math.prod(shape) * first.itemsize
        places[name] = (size, shape, first.dtype.str, isinstance(value, tuple))
        copies.append((size, end, shape, pieces))
        size = -(-end // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(size, dtype=torch.uint8) if slot is None or size > slots.slot_bytes else slot
    view = slots.view(memory, size) if isinstance(memory, int) else memory.numpy()
    for offset, end, shape, pieces in copies:
        np.concatenate(pieces, out=view[offset:end].view(pieces[0].dtype).reshape(shape))
    return Parcel(places, size, memory, row.bad)


def unpack_parcel(parcel: Parcel, slots: RowSlots) -> DecodedRow:
    """The row again; its arrays are views of the slot, which is lent to them, or of the block."""
    memory = parcel.memory
    view = slots.lend(memory, parcel.size) if isinstance(memory, int) else memory.numpy()
    arrays = {}
    for name, (offset, shape, dtype, in_pieces) in parcel.places.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = view[offset : offset + size].view(dtype).reshape(shape)
        arrays[name] = (array,) if in_pieces else array
    return DecodedRow(RowArrays(**arrays), parcel.bad)
