"""Numpy generators for named purposes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from trichord.core.seed import derive_bytes


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A generator (PCG64) for the purpose named by `parts`.

    Its state is a hash of them as it is: numpy would hash a seed once more, in four times the time of all this, and
    one is made for each augmented item.
    """
    seed: Any = _Hashed(parts)  # numpy's own stubs leave out the interface that it names
    return np.random.Generator(np.random.PCG64(seed))


class _Hashed(ISeedSequence):
    def __init__(self, parts: tuple[int | str, ...]) -> None:
        self._parts = parts

    def generate_state(self, n_words: int, dtype: type[np.unsignedinteger] = np.uint32) -> np.ndarray:
        """n_words (<= 8 of 64 bits) of `dtype`, as bit generators ask for their state."""
        return np.frombuffer(derive_bytes(self._parts, n_words * np.dtype(dtype).itemsize), dtype)
