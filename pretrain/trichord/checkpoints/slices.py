"""Slices on disk: a streaming safetensors writer with a hash, and a reader of any range of any parameter."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trichord.checkpoints.manifest import FORMAT, INDEX_FILE, read_verified_json, verify_file
from trichord.core.errors import CheckpointError


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def slice_key(name: str, kind: str) -> str:
    """Key of a slice inside a rank's safetensors file."""
    return f"{name}:{kind}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors (contiguous fp32) as safetensors, hashed on the way to the disk, and fsync.

    The library's writer gives no hash, and reading the file back would double the traffic.

    Returns:
        Size in bytes and BLAKE2b hex digest (16 bytes) of the file.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data that follows stays aligned
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for tensor in tensors.values():
            data = tensor.numpy().data.cast("B") if tensor.numel() else b""
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(head) + offset, digest.hexdigest()


class SliceReader:
    """Any range of any parameter or optimizer state of a checkpoint, whoever wrote it.

    `index.json`: {"format", "params": {name: {"shape", "group"}}, "slices": {name: {kind: [[start, numel, file]]}}}.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.index = read_verified_json(self.folder, INDEX_FILE)
        if self.index.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.folder} has checkpoint format {self.index.get('format')!r}, this version reads {FORMAT}; "
                "use the version of trichord that wrote it"
            )
        self._files: dict[str, Any] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(facts["shape"]) for name, facts in self.index["params"].items()}

    def kinds(self) -> list[str]:
        """All kinds of state that were saved, the weights among them."""
        return sorted({kind for kinds in self.index["slices"].values() for kind in kinds})

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """(numel,) fp32: the elements [start, start + numel) of the flattened parameter or state.

        Raises:
            CheckpointError: the files do not cover the range.
        """
        out = torch.empty(numel, dtype=torch.float32)
        missing = numel
        for first, count, file in self.index["slices"].get(name, {}).get(kind, ()):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                stored = self._open(file).get_slice(slice_key(name, kind))
                out[low - start : high - start] = stored[low - first : high - first]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name!r} covers only {numel - missing} of the elements "
                f"[{start}, {start + numel}); the checkpoint is damaged, resume from an earlier one"
            )
        return out

    def read_full(self, name: str, kind: str = "param") -> Tensor:
        """The whole parameter or state in its own shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            verify_file(self.folder, file)
            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt")
            except Exception as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from error
        return self._files[file]
