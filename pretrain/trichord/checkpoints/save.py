"""Saving without stopping: copy to host memory beside the next step, write and commit in a thread.

`step-N.partial-<attempt>/` is filled by all ranks; each ends with `rank-R.done.json`. When all are there, rank 0
writes `manifest.json` and renames the folder: a checkpoint exists if and only if its folder has that name.
Background threads make no collectives.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import LoaderState
from trichord.checkpoints.commit import done_file, publish, read_done
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.hashes import file_facts
from trichord.checkpoints.manifest import TRAIN_STATE_FILE, checkpoint_name, incomplete_reason, step_folders
from trichord.checkpoints.mirror import Mirror
from trichord.checkpoints.retention import Retention
from trichord.checkpoints.slices import rank_file
from trichord.checkpoints.snapshot import HostImage, Snapshot
from trichord.checkpoints.state import group_hyperparameters, named_parameters, optimizer_step, slices_to_save
from trichord.checkpoints.write import give_way, write_hashed
from trichord.core.log import get_logger
from trichord.core.phase import set_phase
from trichord.core.status import write_atomically
from trichord.engine.masters import torch_optimizer

log = get_logger(__name__)

LATEST_FILE = "latest"
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 0.5  # how often rank 0's thread looks for the done files of the others


@dataclass
class _Save:
    """One save in flight. committed: set by rank 0's thread, which then ends."""

    step: int
    folder: Path
    started: float
    snapshot: Snapshot
    facts: dict[str, Any]
    loader_state: LoaderState
    thread: threading.Thread | None = None
    own_error: str | None = None
    committed: bool = False


class CheckpointSaver:
    """Saves of one run, at most one in flight. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointsConfig,
        attempt: str,
        on_abandoned: Callable[[int, str], None] = lambda step, problem: None,
    ):
        """folder: `runs/NAME/checkpoints`; attempt: equal on all ranks, different in each start of the run;
        on_abandoned: told the step and the problem of a save that failed, on rank 0, in the save's thread."""
        self.folder = Path(folder)
        self.config = config
        self.attempt = attempt
        self.on_abandoned = on_abandoned
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.last_step: int | None = None
        self._running: _Save | None = None
        self._last_failed = False
        self._untold: list[int] = []
        self._image = HostImage()
        self._retention = Retention(self.folder, config)
        self._held: weakref.WeakSet[Any] = weakref.WeakSet()
        self.mirror: Mirror | None = None
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("step-*.partial-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            self.mirror = self._open_mirror()
        dist.barrier()  # before any rank can have begun a save that this would remove

    def begin(
        self,
        engine: Any,
        step: int,
        train_state: dict[str, Any],
        loader_state: LoaderState,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save the state after `step` steps in the background; a save still in flight is finished first.

        The state is copied while the next step computes its gradients; the optimizer waits for the copy before it
        changes anything. `train_state` is rank 0's; `loader_state` holds this rank's lanes; `metrics`, also rank 0's,
        are the newest values, by which `keep_best` judges.
        """
        self._settle()
        self._hold(torch_optimizer(engine))
        partial = self.folder / f"{checkpoint_name(step)}.partial-{self.attempt}"
        facts = {**train_state, "step": step, "optimizer_step": optimizer_step(engine)}
        facts |= {"groups": group_hyperparameters(engine), "metrics": dict(metrics or {})}
        snapshot = self._image.take(slices := slices_to_save(engine), at_once=_changed_by_forward(engine, slices))
        save = _Save(step, partial, time.monotonic(), snapshot, facts, loader_state)
        save.thread = threading.Thread(target=self._work, args=(save,), name="checkpoint-writer", daemon=True)
        save.thread.start()
        self._running = save

    def wait_copied(self) -> None:
        """Wait until the state may be changed again. The optimizer calls it by itself, before each update."""
        if self._running is not None:
            self._running.snapshot.wait_copied()

    @property
    def image_bytes(self) -> memoryview:
        """What this rank wrote last, or is writing: the bytes of its file."""
        return self._image.bytes

    def poll(self) -> int | None:
        """Look at the save in flight. Never waits.

        Returns:
            A step that was committed and not yet told (rank 0 only).
        """
        save = self._running
        if save is not None and save.thread is not None and not save.thread.is_alive():
            self._running = None
            self._last_failed = not save.committed
            if save.committed:
                self.last_step = save.step
                self._untold.append(save.step)
        return self._untold.pop(0) if self._untold else None

    def news(self) -> list[dict[str, Any]]:
        """What became of copies on the mirror since the last call: `step`, `ok`, and `seconds` or `reason`."""
        return self.mirror.news() if self.mirror is not None else []

    def finish_mirror(self) -> bool:
        """At the very end: wait for the last copy, at most `mirror_wait_s`. False: it is not there, which is said."""
        return self.mirror is None or self.mirror.wait(self.config.mirror_wait_s)

    def finish(self) -> bool:
        """Wait until the save in flight is committed or abandoned. All ranks must call it at the same step.

        Returns:
            Whether the last save was committed, equal on all ranks.
        """
        set_phase("last save")
        committed = self._settle()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        agreed = torch.tensor([int(committed)], device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _settle(self) -> bool:
        """Wait for this rank's part of the save in flight; on rank 0, until it is committed or abandoned.

        No collective: ranks end their parts at different times. Returns False only on rank 0, if the last save was
        abandoned.
        """
        save = self._running
        if save is not None:
            assert save.thread is not None
            save.thread.join()
            told = self.poll()
            if told is not None:
                self._untold.insert(0, told)  # for the loop, which asks later
        return self.rank != 0 or not self._last_failed

    def _open_mirror(self) -> Mirror | None:
        """The mirror, and what an earlier attempt could not bring there."""
        if self.config.mirror is None:
            return None
        mirror = Mirror(self.folder.parent, self.config)
        whole = [path for path in step_folders(self.folder).values() if incomplete_reason(path) is None]
        if whole:
            mirror.submit(whole[-1])
        return mirror

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the optimizer's step begins with `wait_copied`."""
        if optimizer not in self._held:
            self._held.add(optimizer)
            optimizer.register_step_pre_hook(lambda *_: self.wait_copied())

    def _work(self, save: _Save) -> None:
        """The thread of a save: copy, write, and on rank 0 commit."""
        done = self._write(save)
        try:
            save.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(done_file(save.folder, self.rank), json.dumps(done))
        except OSError as error:
            save.own_error = f"{type(error).__name__}: {error}"
            log.error("checkpoint: cannot even write the done file in %s: %s", save.folder, error)
        if self.rank == 0:
            self._commit(save)

    def _write(self, save: _Save) -> dict[str, Any]:
        """This rank's files. Returns what the done file says: sizes and hashes, or the error."""
        file = save.folder / rank_file(self.rank)
        try:
            save.snapshot.copy()
            give_way()  # from here on nobody waits for this thread, and those that it starts
            save.folder.mkdir(parents=True, exist_ok=True)
            files = {file.name: write_hashed(file, save.snapshot.image)}
            if self.rank == 0:
                path = write_atomically(save.folder / TRAIN_STATE_FILE, json.dumps(save.facts, indent=1))
                files[path.name] = file_facts(path)
            return {"index": save.snapshot.index, "loader": save.loader_state.to_json(), "files": files}
        except Exception as error:  # any failure must reach rank 0, which otherwise waits for this rank
            save.own_error = f"{type(error).__name__}: {error}"
            with suppress(OSError):
                file.unlink(missing_ok=True)  # on a full disk: room for the done file
            return {"error": save.own_error}

    def _commit(self, save: _Save) -> None:
        """In rank 0's thread: wait for all done files, then make the folder a checkpoint, or abandon it."""
        try:
            problem, done = self._wait_done(save)
            if problem is None:
                publish(save.folder, save.step, self.attempt, done)
                save.committed = True
        except Exception as error:  # it must be told, and the thread's end is not looked at
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            log.error("checkpoint of step %d abandoned, the previous one stays: %s", save.step, problem)
            shutil.rmtree(save.folder, ignore_errors=True)
            self.on_abandoned(save.step, problem)
            return
        name = checkpoint_name(save.step)
        try:
            write_atomically(self.folder / LATEST_FILE, name + "\n")
        except OSError as error:  # a hint for humans: the checkpoint itself is there
            log.warning("cannot write %s: %s", self.folder / LATEST_FILE, error)
        log.info("checkpoint %s saved in %.1f s", name, time.monotonic() - save.started)
        if self.mirror is not None:
            self.mirror.submit(self.folder / name)
        try:
            self._retention.apply(save.step, self.mirror.held if self.mirror is not None else ())
        except OSError as error:
            log.warning("old checkpoints in %s cannot be removed: %s", self.folder, error)

    def _wait_done(self, save: _Save) -> tuple[str | None, dict[int, dict[str, Any]]]:
        """What is wrong, or None, and what the done files of all ranks say."""
        pause_s = _FIRST_LOOK_S
        while True:
            done = read_done(save.folder, self.world_size)
            if save.own_error is not None:
                done[self.rank] = {"error": save.own_error}  # also where its done file could not be written
            missing = sorted(set(range(self.world_size)) - set(done))
            late = time.monotonic() - save.started > self.config.commit_timeout_s
            if not missing or late:
                break  # also after an error not before: the others are still writing into the folder
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LAST_LOOK_S)
        problems = [f"rank {rank}: {facts['error']}" for rank, facts in done.items() if "error" in facts]
        if missing:
            problems.append(f"ranks {missing} were not done after {self.config.commit_timeout_s:.0f} s")
        return "; ".join(problems) or None, done


def _changed_by_forward(engine: Any, pieces: list[Any]) -> frozenset[str]:
    """Names of what is no parameter, such as batch statistics: the next forward pass changes it."""
    parameters = {name for name, _ in named_parameters(engine)}
    return frozenset(piece.name for piece in pieces) - parameters
