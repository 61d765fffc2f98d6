"""Slices on disk: their names, and a reader of any range of any parameter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trichord.checkpoints.manifest import FORMAT, INDEX_FILE, Manifest, read_json
from trichord.core.errors import CheckpointError


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def slice_key(name: str, kind: str) -> str:
    """Key of a slice inside a rank's safetensors file."""
    return f"{name}:{kind}"


class SliceReader:
    """Any range of any parameter or optimizer state of a checkpoint, whoever wrote it.

    `index.json`: {"format", "params": {name: {"shape", "group"}}, "slices": {name: {kind: [[start, numel, file]]}}}.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._manifest = Manifest(self.folder)
        self._manifest.verify(INDEX_FILE)
        self.index = read_json(self.folder / INDEX_FILE)
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
            self._manifest.verify(file)  # once: it stays open
            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt")
            except Exception as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from error
        return self._files[file]
