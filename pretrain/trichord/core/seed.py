"""Randomness keyed by what it is for, never by rank: the same (seed, step, lane or sample) draws the same numbers.

All of Trichord's own randomness goes through here, so that order, augmentation and initialisation do not depend on
how the work is split over processes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of ints and strings, stable over platforms and Python versions (BLAKE2b)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator (PCG64) for the purpose named by `parts`."""
    import numpy as np  # not part of the base install that a login node has

    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))
