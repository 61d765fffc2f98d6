"""Randomness keyed by what it is for, never by rank: the same (seed, step, lane or sample) draws the same numbers.

All of Trichord's own randomness goes through here, so that order, augmentation and initialisation do not depend on
how the work is split over processes.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of ints and strings, stable over platforms and Python versions (BLAKE2b)."""
    return int.from_bytes(derive_bytes(parts, 8), "little") >> 1


def derive_bytes(parts: tuple[int | str, ...], size: int) -> bytes:
    """At most 64 pseudo-random bytes named by `parts`."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
