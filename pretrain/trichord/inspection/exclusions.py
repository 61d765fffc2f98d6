"""Which exclude lists leave nothing out: written for other shards, or for other names of these."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from trichord.samples.filters import read_exclude_list
from trichord.samples.unread import unmatched
from trichord.shards.config import SourceConfig


def key_hash(key: str) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).digest()


class ExcludeLists:
    """The lists of all sources, held against the shards as they are walked."""

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        """Reads the lists. Raises ConfigError where one cannot be read."""
        self._sources = {source.name: source.filters.exclude for source in sources}
        paths = dict.fromkeys(path for lists in self._sources.values() for path in lists)
        self._lines = {path: read_exclude_list(path) for path in paths}
        self._matched: set[str] = set()

    def look(self, source: str, shard: str, key_hashes: bytes) -> None:
        """A shard of a source; key_hashes: 16 bytes for each of its samples, as `key_hash` makes them."""
        name = os.path.basename(shard)
        for path in self._sources[source]:
            keys = {key_hash(key) for listed, key in self._lines[path] if listed == name}
            if path not in self._matched and keys and _holds_any(key_hashes, keys):
                self._matched.add(path)

    def warnings(self) -> list[tuple[str, str]]:
        """(source, sentence) for each list of which no line matched a sample of a source that names it."""
        found = []
        for path, lines in self._lines.items():
            having = [name for name, lists in self._sources.items() if path in lists]
            if lines and path not in self._matched:
                found.append((having[0], unmatched(path, len(lines), having)))
        return found


def _holds_any(key_hashes: bytes, wanted: set[bytes]) -> bool:
    return any(key_hashes[at : at + 16] in wanted for at in range(0, len(key_hashes), 16))
