"""From the files of all ranks to a checkpoint: done files, index, manifest, and the rename that makes it one.

Rank 0 does it in the thread that wrote its own part: nothing here is a collective, and training does not wait.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trichord.batches.loader import LoaderState
from trichord.checkpoints.hashes import file_facts
from trichord.checkpoints.manifest import FORMAT, INDEX_FILE, LOADER_FILE, MANIFEST_FILE, checkpoint_name
from trichord.checkpoints.slices import rank_file
from trichord.core.errors import CheckpointError
from trichord.core.status import fsync_folder, try_write, write_atomically


def done_file(folder: Path, rank: int) -> Path:
    """What a rank writes last: sizes and hashes of its files, its part of the index, or its error."""
    return folder / f"rank-{rank:05d}.done.json"


def read_done(folder: Path, world_size: int) -> dict[int, dict[str, Any]]:
    """The done files that are there, by rank."""
    paths = {rank: done_file(folder, rank) for rank in range(world_size)}
    return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}


def publish(partial: Path, step: int, attempt: str, done: dict[int, dict[str, Any]]) -> Path:
    """index.json, loader.json, manifest.json, rename, each on disk before the next. Returns the checkpoint's folder.

    done: of all ranks. Raises OSError.
    """
    files = {name: facts for part in done.values() for name, facts in part["files"].items()}
    loader = LoaderState.merge([LoaderState.from_json(done[rank]["loader"]) for rank in sorted(done)])
    for name, content in ((INDEX_FILE, merge_index(done)), (LOADER_FILE, loader.to_json())):
        files[name] = file_facts(write_atomically(partial / name, json.dumps(content)))
    for rank in done:
        done_file(partial, rank).unlink()
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": len(done),
        "attempt": attempt,
        "data_digest": loader.digest(),
        "files": files,
    }
    write_atomically(partial / MANIFEST_FILE, json.dumps(manifest, indent=1))
    final = partial.with_name(checkpoint_name(step))
    if final.exists():  # saved before, by an attempt that went back: aside first, so that one of them always exists
        aside = final.with_name(f"{final.name}.replaced-{attempt}")
        os.rename(final, aside)
        os.rename(partial, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(partial, final)
    fsync_folder(final.parent)
    return final


def put_back_replaced(folder: Path) -> None:
    """Give checkpoints that a dying save had moved aside and not yet replaced their name back. Rank 0, at the start."""
    for aside in Path(folder).glob("step-*.replaced-*"):
        final = aside.with_name(aside.name.partition(".")[0])
        if not final.exists():
            os.rename(aside, final)


def merge_index(done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """index.json from the parts of all ranks."""
    merged: dict[str, Any] = {"format": FORMAT, "params": {}, "slices": {}}
    for rank in sorted(done):
        index = done[rank]["index"]
        merged["params"].update(index["params"])
        for name, kinds in index["slices"].items():
            for kind, (start, numel) in kinds.items():
                pieces = merged["slices"].setdefault(name, {}).setdefault(kind, [])
                pieces.append([start, numel, rank_file(rank)])
    for kinds in merged["slices"].values():
        for pieces in kinds.values():
            pieces.sort()
    return merged


def require_writable(folder: Path) -> None:
    """Fail before training, not at the first save.

    Raises:
        CheckpointError: nothing can be written in `folder`.
    """
    try:
        try_write(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}; set run.root to a folder you own") from error
