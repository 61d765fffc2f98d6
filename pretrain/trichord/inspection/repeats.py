"""Which of very many hashes occur more than once, with memory for a small part of them at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

BUCKETS = 64
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("sample", "<u4")])


class Repeats:
    """Collects (128-bit hash, shard number, sample number) in files by the first bits of the hash.

    Memory: one of 64 buckets at a time, 24 bytes per sample in it.
    """

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        self.count = 0

    def __enter__(self) -> Repeats:
        self._files = [tempfile.TemporaryFile() for _ in range(BUCKETS)]  # noqa: SIM115  closed in __exit__
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, hashes: bytes, shard: int, samples: np.ndarray) -> None:
        """hashes: 16 bytes for each of `samples` (n,)."""
        records = np.empty(len(samples), dtype=_RECORD)
        words = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)
        records["high"], records["low"] = words[:, 0], words[:, 1]
        records["shard"], records["sample"] = shard, samples
        buckets = records["high"] % BUCKETS
        for bucket in np.unique(buckets).tolist():
            self._files[bucket].write(records[buckets == bucket].tobytes())
        self.count += len(records)

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """(shard, sample) of each hash that occurs more than once, in order of the shards."""
        for file in self._files:
            file.seek(0)
            records = np.frombuffer(file.read(), dtype=_RECORD)
            records = records[np.lexsort((records["sample"], records["shard"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
            edges = np.flatnonzero(np.diff(np.concatenate(([0], same.astype(np.int8), [0]))))
            for start, end in edges.reshape(-1, 2).tolist():
                group = records[start : end + 1]
                yield list(zip(group["shard"].tolist(), group["sample"].tolist()))
