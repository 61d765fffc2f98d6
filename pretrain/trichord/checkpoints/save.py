"""Saving without stopping: snapshot to host buffers, write in a thread, commit at a later step boundary.

`step-N.partial-<attempt>/` is filled by all ranks; each ends with `rank-R.done.json`. When all are there, rank 0
writes `manifest.json` and renames the folder: a checkpoint exists if and only if its folder has that name.
Background threads make no collectives.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trichord.batches.loader import LoaderState
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.manifest import (
    FORMAT,
    INDEX_FILE,
    LOADER_FILE,
    MANIFEST_FILE,
    TRAIN_STATE_FILE,
    checkpoint_name,
    hash_file,
    step_folders,
)
from trichord.checkpoints.slices import rank_file, slice_key, write_safetensors
from trichord.checkpoints.state import group_hyperparameters, optimizer_step, slices_to_save
from trichord.core.errors import CheckpointError
from trichord.core.log import get_logger
from trichord.core.status import fsync_folder, write_atomically

log = get_logger(__name__)

LATEST_FILE = "latest"


@dataclass
class _Save:
    """One save in flight."""

    step: int
    folder: Path
    started: float
    thread: threading.Thread | None = None


class CheckpointSaver:
    """Saves of one run, at most one in flight. Every rank has one and calls it at the same steps."""

    def __init__(self, folder: Path, config: CheckpointsConfig, attempt: str):
        """folder: `runs/NAME/checkpoints`; attempt: equal on all ranks, different in each start of the run."""
        self.folder = Path(folder)
        self.config = config
        self.attempt = attempt
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.last_step: int | None = None
        self._running: _Save | None = None
        self._own_error: str | None = None
        self._buffers: dict[str, Tensor] = {}
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("step-*.partial-*"):
                shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier()  # before any rank can have begun a save that this would remove

    def begin(self, engine: Any, step: int, train_state: dict[str, Any], loader_state: LoaderState) -> None:
        """Take a snapshot of the state after `step` steps and write it in the background. A save still in flight is
        finished first. `train_state` is rank 0's; `loader_state` holds this rank's lanes."""
        self._settle()
        self._own_error = None
        partial = self.folder / f"{checkpoint_name(step)}.partial-{self.attempt}"
        partial.mkdir(parents=True, exist_ok=True)
        tensors, index = self._snapshot(engine)
        facts = {**train_state, "step": step, "optimizer_step": optimizer_step(engine)}
        facts["groups"] = group_hyperparameters(engine)
        work = (partial, tensors, index, facts, loader_state.to_json())
        save = _Save(step, partial, time.monotonic())
        save.thread = threading.Thread(target=self._write, args=work, name="checkpoint-writer", daemon=True)
        save.thread.start()
        self._running = save

    def poll(self) -> int | None:
        """Commit the save in flight if all ranks are done. Never waits.

        Returns:
            The step that was committed now (rank 0 only).
        """
        save = self._running
        if save is None or save.thread is None or save.thread.is_alive():
            return None
        if self.rank != 0:
            return None
        done = self._done_files(save)
        missing = sorted(set(range(self.world_size)) - set(done))
        late = time.monotonic() - save.started > self.config.commit_timeout_s
        if missing and not late:
            return None  # also after an error: the others are still writing into the folder
        problems = [f"rank {rank}: {facts['error']}" for rank, facts in done.items() if "error" in facts]
        if missing:
            problems.append(f"ranks {missing} were not done after {self.config.commit_timeout_s:.0f} s")
        if problems:
            return self._abandon(save, "; ".join(problems))
        return self._commit(save, done)

    def finish(self) -> bool:
        """Wait until the save in flight is committed or abandoned. All ranks must call it at the same step.

        Returns:
            Whether the last save was committed, equal on all ranks.
        """
        committed = self._settle()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        agreed = torch.tensor([int(committed)], device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _settle(self) -> bool:
        """Wait for this rank's part of the save in flight; on rank 0, until it is committed or abandoned.

        No collective: rank 0 forgets a save when it commits it, the others only here, so they may not agree on whether
        there is one. Returns False only on rank 0, if the save was abandoned.
        """
        save = self._running
        if save is None:
            return True
        assert save.thread is not None
        save.thread.join()
        while self.rank == 0 and self._running is save:
            self.poll()
            time.sleep(0.02)
        self._running = None
        return self.rank != 0 or self.last_step == save.step

    def _snapshot(self, engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies in host buffers that are allocated once and reused, and this rank's part of the index."""
        index: dict[str, Any] = {"params": {}, "slices": {}}
        tensors = {}
        for piece in slices_to_save(engine):
            index["params"][piece.name] = {"shape": list(piece.shape), "group": piece.group}
            for kind, live in piece.tensors.items():
                key = slice_key(piece.name, kind)
                buffer = self._buffers.get(key)
                if buffer is None or buffer.numel() != live.numel():
                    buffer = self._buffers[key] = torch.empty(live.numel(), dtype=torch.float32)
                buffer.copy_(live)
                tensors[key] = buffer
                index["slices"].setdefault(piece.name, {})[kind] = [piece.start, piece.numel]
        return tensors, index

    def _write(self, folder: Path, tensors: dict, index: dict, facts: dict, loader_state: dict) -> None:
        """In the thread: this rank's files, then its done file, which says sizes and hashes, or the error."""
        done: dict[str, Any] = {"index": index, "loader": loader_state}
        try:
            file = rank_file(self.rank)
            size, digest = write_safetensors(folder / file, tensors)
            done["files"] = {file: {"size": size, "blake2b": digest}}
            if self.rank == 0:
                path = write_atomically(folder / TRAIN_STATE_FILE, json.dumps(facts, indent=1))
                done["files"][path.name] = {"size": path.stat().st_size, "blake2b": hash_file(path)}
        except Exception as error:  # any failure must reach rank 0, which otherwise waits for this rank
            done = {"error": f"{type(error).__name__}: {error}"}
            self._own_error = done["error"]
            (folder / rank_file(self.rank)).unlink(missing_ok=True)  # on a full disk: room for the done file
        try:
            write_atomically(folder / f"rank-{self.rank:05d}.done.json", json.dumps(done))
        except OSError as error:
            self._own_error = f"{type(error).__name__}: {error}"
            log.error("checkpoint: cannot even write the done file in %s: %s", folder, error)

    def _done_files(self, save: _Save) -> dict[int, dict[str, Any]]:
        paths = {rank: save.folder / f"rank-{rank:05d}.done.json" for rank in range(self.world_size)}
        done = {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}
        if self._own_error is not None:
            done[self.rank] = {"error": self._own_error}  # also where its done file could not be written
        return done

    def _abandon(self, save: _Save, reason: str) -> None:
        log.error("checkpoint of step %d abandoned, the previous one stays: %s", save.step, reason)
        shutil.rmtree(save.folder, ignore_errors=True)
        self._running = None

    def _commit(self, save: _Save, done: dict[int, dict[str, Any]]) -> int | None:
        try:
            self._publish(save, done)
        except OSError as error:
            return self._abandon(save, f"{type(error).__name__}: {error}")
        self._running = None
        self.last_step = save.step
        try:
            write_atomically(self.folder / LATEST_FILE, checkpoint_name(save.step) + "\n")
        except OSError as error:  # a hint for humans: the checkpoint itself is there
            log.warning("cannot write %s: %s", self.folder / LATEST_FILE, error)
        log.info("checkpoint %s saved in %.1f s", checkpoint_name(save.step), time.monotonic() - save.started)
        self._remove_old()
        return save.step

    def _publish(self, save: _Save, done: dict[int, dict[str, Any]]) -> None:
        """index.json, loader.json, manifest.json, rename, each on disk before the next."""
        files = {name: facts for part in done.values() for name, facts in part["files"].items()}
        loader = LoaderState.merge([LoaderState.from_json(done[rank]["loader"]) for rank in sorted(done)])
        for name, content in ((INDEX_FILE, _merge_index(done)), (LOADER_FILE, loader.to_json())):
            path = write_atomically(save.folder / name, json.dumps(content))
            files[name] = {"size": path.stat().st_size, "blake2b": hash_file(path)}
        for rank in done:
            (save.folder / f"rank-{rank:05d}.done.json").unlink()
        manifest = {
            "format": FORMAT,
            "step": save.step,
            "world_size": self.world_size,
            "attempt": self.attempt,
            "data_digest": loader.digest(),
            "files": files,
        }
        write_atomically(save.folder / MANIFEST_FILE, json.dumps(manifest, indent=1))
        final = self.folder / checkpoint_name(save.step)
        if final.exists():  # saved before, by an attempt that went back: aside first, so that one of them always exists
            aside = final.with_name(f"{final.name}.replaced-{self.attempt}")
            os.rename(final, aside)
            os.rename(save.folder, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(save.folder, final)
        fsync_folder(self.folder)

    def _remove_old(self) -> None:
        kept = list(step_folders(self.folder).values())
        for path in kept[: -self.config.keep_last]:
            # The name goes first: a half-removed folder must not look like a checkpoint.
            doomed = path.with_name(f"{path.name}.partial-removed")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def put_back_replaced(folder: Path) -> None:
    """Give checkpoints that a dying save had moved aside and not yet replaced their name back. Rank 0, at the start."""
    for aside in Path(folder).glob("step-*.replaced-*"):
        final = aside.with_name(aside.name.partition(".")[0])
        if not final.exists():
            os.rename(aside, final)


def _merge_index(done: dict[int, dict[str, Any]]) -> dict[str, Any]:
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
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}; set run.root to a folder you own") from error
