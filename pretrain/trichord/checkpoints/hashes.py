"""Hashes of a checkpoint's files: BLAKE3 of what is written; what earlier versions wrote is still read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

HASH = "blake3"
"""Key of the hash in the manifest of a new checkpoint; docs/decisions/checkpoint-hash.md says why this one."""
KNOWN_HASHES = ("blake3", "blake2b")
_BLOCK_BYTES = 2**22


def new_digest(kind: str = HASH) -> Any:
    """An empty digest with `update` and `hexdigest`. kind: `blake3` (32 bytes) or `blake2b` (16 bytes)."""
    if kind == "blake2b":
        return hashlib.blake2b(digest_size=16)
    from blake3 import blake3  # not of the base install: a login node names checkpoints and hashes none

    return blake3()


def hash_file(path: Path, kind: str = HASH) -> str:
    """Hex digest of a file. Reads all of it; raises OSError."""
    digest = new_digest(kind)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size in bytes and its hash. Reads all of it."""
    return {"size": path.stat().st_size, HASH: hash_file(path)}
