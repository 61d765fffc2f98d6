"""Where one shard ends and the next begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of range(count) as (count,) int64, the same on every platform and with every library version."""
    import hashlib

    import numpy as np

    keys = hashlib.shake_128(b"build" + seed.to_bytes(8, "little", signed=True)).digest(8 * count)
    return np.frombuffer(keys, "<u8").argsort(kind="stable")


def cut(sizes: np.ndarray, max_samples: int, max_bytes: int, even: bool = True) -> list[int]:
    """Bounds of the shards: shard i holds rows [bounds[i], bounds[i + 1]).

    No shard holds more than `max_samples` rows, nor more than `max_bytes` bytes unless it is a single row. There are
    about as few shards as that allows. even: all hold about as much, by rows or by bytes, whichever makes the number of
    shards; else each is filled before the next begins.

    Args:
        sizes: (n,) bytes of each row, in order; n is at least 1.
    """
    import numpy as np

    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    full = _cut_full(ends, max_samples, max_bytes)
    if not even:
        return full
    fewest = len(full) - 1
    for shards in range(fewest, fewest + fewest // 4 + 3):
        bounds = _cut_even(ends, shards, by_rows=_rows_decide(ends, max_samples, max_bytes))
        if _fits(bounds, ends, max_samples, max_bytes):
            return bounds.tolist()
    return full  # a few rows of very different sizes


def _rows_decide(ends: np.ndarray, max_samples: int, max_bytes: int) -> bool:
    return (len(ends) - 1) / max_samples >= ends[-1] / max_bytes


def _cut_full(ends: np.ndarray, max_samples: int, max_bytes: int) -> list[int]:
    import numpy as np

    count, bounds = len(ends) - 1, [0]
    while bounds[-1] < count:
        start = bounds[-1]
        by_bytes = int(np.searchsorted(ends, ends[start] + max_bytes, side="right")) - 1
        bounds.append(min(max(start + 1, by_bytes), start + max_samples, count))
    return bounds


def _cut_even(ends: np.ndarray, shards: int, by_rows: bool) -> np.ndarray:
    import numpy as np

    count = len(ends) - 1
    if by_rows:
        return np.arange(shards + 1) * count // shards
    targets = np.arange(shards + 1) * (ends[-1] / shards)
    after = np.clip(np.searchsorted(ends, targets), 1, count)
    nearer_before = targets - ends[after - 1] < ends[after] - targets
    bounds = after - nearer_before
    bounds[0], bounds[-1] = 0, count
    return bounds


def _fits(bounds: np.ndarray, ends: np.ndarray, max_samples: int, max_bytes: int) -> bool:
    rows, sizes = bounds[1:] - bounds[:-1], ends[bounds[1:]] - ends[bounds[:-1]]
    return bool(((rows > 0) & (rows <= max_samples) & ((sizes <= max_bytes) | (rows == 1))).all())
