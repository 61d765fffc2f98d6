"""A checkpoint from outside: its folder, its manifest, its JSON files. No torch: a login node looks at it, too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
    if not (path / MANIFEST_FILE).exists():
        return "no manifest.json" if path.exists() else "does not exist"
    try:
        files = read_json(path / MANIFEST_FILE)["files"]
        for name, facts in files.items():
            size = (path / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes, the manifest says {facts['size']}"
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def hash_file(path: Path) -> str:
    """BLAKE2b hex digest (16 bytes) of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def verify_file(folder: Path, name: str) -> None:
    """Compare a file's bytes with the hash in the manifest. Reads the whole file once.

    Raises:
        CheckpointError: they differ, or the manifest does not know the file.
    """
    try:
        expected = read_json(folder / MANIFEST_FILE)["files"][name]["blake2b"]
        found = hash_file(folder / name)
    except (KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / name}: {type(error).__name__}: {error}; the checkpoint is damaged") from error
    if found != expected:
        raise CheckpointError(
            f"{folder / name} has the hash {found}, the manifest says {expected}: its bytes have changed since it was "
            f"written. Copy a whole one back, or remove {folder} to go on from the checkpoint before it"
        )


def read_verified_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, its hash checked first."""
    verify_file(folder, name)
    return read_json(folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is incomplete or damaged") from error
