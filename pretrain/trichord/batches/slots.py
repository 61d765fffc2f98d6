"""Memory that decode workers write rows into and batches are made of, mapped once and used again and again.

A fresh block of shared memory per row costs more than decoding a small one: the kernel hands out and zeroes every page
of it, in two processes. Measured on rows of 10 MB, 32 samples: 554 us of CPU per sample with a block per row, 76 with
these.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.11 on; the value is Linux's
SLOT_BYTES = 256 * 2**20
"""Address space of a slot. Memory is taken as rows fill it: as much as the largest row that was in it."""


class _Lent:
    """What all arrays over lent memory refer to in the end, however they are sliced and cast: numpy's `base`."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory


class RowSlots:
    """Slots shared with the processes that are forked after this one has made them.

    This process takes a slot for a row, a worker fills it, this process lends it out to whoever reads the row, and has
    it back when nothing here refers to it any more; a process that is forked while a batch is held has to copy it.
    Where readers keep so many rows that no slot is left, further rows come in blocks of their own.
    """

    def __init__(self, count: int, slot_bytes: int = SLOT_BYTES) -> None:
        self.slot_bytes = slot_bytes
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            self._maps = [mmap.mmap(-1, slot_bytes, flags=flags) for _ in range(count)]
        except OSError:  # a limit on address space, or no overcommit: rows then travel in blocks of their own
            self._maps = []
        self._free = deque(range(len(self._maps)))

    def take(self) -> int | None:
        """A slot that nobody uses; None: there is none, the row travels in a block of its own."""
        return self._free.popleft() if self._free else None

    def give_back(self, slot: int) -> None:
        """Its contents are no longer looked at."""
        self._free.appendleft(slot)  # the one used last first: it is in the cache, and fewer are ever touched

    def lend(self, slot: int, size: int) -> np.ndarray:
        """The first `size` bytes, uint8. The slot comes back when the last array or tensor over them is gone."""
        lent = _Lent(self.view(slot, size))
        weakref.finalize(lent, self.give_back, slot).atexit = False
        return np.asarray(lent)

    def view(self, slot: int, size: int) -> np.ndarray:
        """The first `size` bytes, uint8, writeable."""
        return np.frombuffer(self._maps[slot], dtype=np.uint8, count=size)
