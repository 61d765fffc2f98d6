"""A checkpoint from outside: its folder, its manifest, its JSON files. No torch: a login node looks at it, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trichord.checkpoints.hashes import KNOWN_HASHES, hash_file
from trichord.core.errors import CheckpointError

FORMAT = 1
INDEX_FILE = "index.json"
MANIFEST_FILE = "manifest.json"
TRAIN_STATE_FILE = "train_state.json"
LOADER_FILE = "loader.json"


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder of all checkpoints below `runs/NAME/checkpoints`, whole or not, oldest first."""
    named = {path: path.name.removeprefix("step-") for path in sorted(Path(folder).glob("step-*"))}
    return {int(step): path for path, step in named.items() if step.isdigit()}


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def incomplete_reason(path: Path) -> str | None:
    """Why a folder is no complete checkpoint; None if it is one. Checks names and sizes, not hashes."""
    path = Path(path)
    if not (path / MANIFEST_FILE).exists():
        return "no manifest.json" if path.exists() else "does not exist"
    try:
        manifest = Manifest(path)
        for name in manifest.files:
            size, expected = (path / name).stat().st_size, manifest.size(name)
            if size != expected:
                return f"{name} has {size} bytes, the manifest says {expected}"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


class Manifest:
    """`manifest.json` of a checkpoint folder, read once."""

    def __init__(self, folder: Path):
        """Raises CheckpointError: it is missing, no JSON, or names no files."""
        self.folder = Path(folder)
        self.content = read_json(self.folder / MANIFEST_FILE)
        files = self.content.get("files")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{self.folder / MANIFEST_FILE} is damaged: it names no files")
        self.files: dict[str, Any] = files

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError: the manifest does not say."""
        size = self._facts(name).get("size")
        if not isinstance(size, int):
            raise CheckpointError(f"{self.folder / MANIFEST_FILE} is damaged: it says no size of {name}")
        return size

    def hash(self, name: str) -> tuple[str, str]:
        """Kind and hex digest. Raises CheckpointError: the manifest says none that this version knows."""
        facts = self._facts(name)
        for kind in KNOWN_HASHES:
            if isinstance(facts.get(kind), str):
                return kind, facts[kind]
        raise CheckpointError(
            f"{self.folder / MANIFEST_FILE} says no hash of {name} that this version knows, which are "
            f"{', '.join(KNOWN_HASHES)}: it is damaged, or a later version wrote it"
        )

    def verify(self, name: str) -> None:
        """Compare a file's bytes with its hash. Reads the whole file once.

        Raises:
            CheckpointError: they differ, or the manifest does not know the file.
        """
        kind, expected = self.hash(name)
        try:
            found = hash_file(self.folder / name, kind)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}; the checkpoint is damaged") from error
        if found != expected:
            raise CheckpointError(
                f"{self.folder / name} has the hash {found}, the manifest says {expected}: its bytes have changed "
                f"since the save. Copy a whole one back, or remove {self.folder} to go on from the one before it"
            )

    def _facts(self, name: str) -> dict[str, Any]:
        facts = self.files.get(name)
        if not isinstance(facts, dict):
            raise CheckpointError(f"{self.folder / MANIFEST_FILE} is damaged: it says nothing of {name}")
        return facts


def read_verified_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, its hash checked first."""
    Manifest(folder).verify(name)
    return read_json(Path(folder) / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is incomplete or damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; the checkpoint is damaged")
    return content
