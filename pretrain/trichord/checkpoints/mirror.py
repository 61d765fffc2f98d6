"""Checkpoints elsewhere, too: copied by a thread of rank 0, and fetched from there when a run starts on an empty disk.

The loop never waits for the storage, and no storage can end a run: what fails is warned of and written into the events.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.manifest import (
    TRAIN_STATE_FILE,
    Manifest,
    checkpoint_name,
    incomplete_reason,
    read_json,
)
from trichord.checkpoints.mirror_place import mirror_of, whole_steps
from trichord.checkpoints.mirror_store import MirrorStore
from trichord.checkpoints.retention import reasons_to_keep, score_of, shown_reasons
from trichord.core.errors import CheckpointError, ConfigError
from trichord.core.log import get_logger
from trichord.core.status import write_atomically
from trichord.shards.cache import cache_root, name_of
from trichord.shards.locations import is_remote, shown

log = get_logger(__name__)

IDENTITY_FILE = "mirrored.json"
"""Of a run folder and of its place on the mirror: a name that no other run has."""


class Mirror:
    """Uploads committed checkpoints, one at a time; of those that wait only the newest."""

    def __init__(self, run_folder: Path, config: CheckpointsConfig):
        """Raises ConfigError: no file system goes by `config.mirror`."""
        assert config.mirror is not None
        self.run_folder = Path(run_folder)
        self.config = config
        self.store = MirrorStore(mirror_of(config.mirror, self.run_folder))
        self._lock = threading.Condition()
        self._uploading: Path | None = None
        self._pending: Path | None = None
        self._thread: threading.Thread | None = None
        self._news: list[dict[str, Any]] = []
        self._scores: dict[int, float | None] = {}

    def submit(self, folder: Path) -> None:
        """Upload this checkpoint folder when the one before is there; one that still waits is left out. Never waits."""
        with self._lock:
            if self._pending is not None:
                log.info("mirror: %s is left out, %s is newer", self._pending.name, folder.name)
            self._pending = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True)
                self._thread.start()

    @property
    def held(self) -> set[int]:
        """Steps whose folders must stay until they are uploaded."""
        with self._lock:
            paths = (self._uploading, self._pending)
        return {int(path.name.removeprefix("step-")) for path in paths if path is not None}

    def news(self) -> list[dict[str, Any]]:
        """What became of uploads since the last call: `step`, `ok`, and `seconds` or `reason`."""
        with self._lock:
            told, self._news = self._news, []
        return told

    def wait(self, timeout_s: float) -> bool:
        """Until nothing is to be uploaded any more; False: it took longer, which is said."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if self._thread is None:
                return True
            last = self._pending or self._uploading
            log.info("mirror: waiting up to %.0f s for %s", timeout_s, last.name if last is not None else "its end")
            while self._thread is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._lock.wait(left_s):
                    break
            ended = self._thread is None
            names = [path.name for path in (self._uploading, self._pending) if path is not None]
        if not ended:
            log.warning(
                "mirror: %s not at %s after %.0f s (checkpoints.mirror_wait_s); it is whole in %s",
                *(" and ".join(names), shown(self.store.url), timeout_s, self.run_folder / "checkpoints"),
            )
        return ended

    def _work(self) -> None:
        while True:
            with self._lock:
                self._uploading, self._pending = self._pending, None
                if self._uploading is None:
                    self._thread = None
                    self._lock.notify_all()
                    return
                folder = self._uploading
            told = self._upload(folder)
            with self._lock:
                self._news.append(told)

    def _upload(self, folder: Path) -> dict[str, Any]:
        step, began = int(folder.name.removeprefix("step-")), time.monotonic()
        try:
            claim(self.store, self.run_folder)
            self.store.put_side_folders(self.run_folder)
            sent = self.store.put(folder)
        except Exception as error:  # training goes on, whatever a storage's client raises
            log.warning("mirror: %s is not at %s: %s", folder.name, shown(self.store.url), error)
            return {"step": step, "ok": False, "reason": str(error)}
        seconds = time.monotonic() - began
        log.info("mirror: %s at %s, %.2f GB in %.1f s", folder.name, shown(self.store.url), sent / 1e9, seconds)
        try:
            self._remove_old(step)
        except Exception as error:
            log.warning("mirror: old checkpoints at %s cannot be removed: %s", shown(self.store.url), error)
        return {"step": step, "ok": True, "seconds": round(seconds, 3), "bytes": sent}

    def _remove_old(self, saved: int) -> None:
        """The rules of the run folder, on what is there. Torn uploads count for nothing and go with age."""
        self._scores.pop(saved, None)
        steps = self.store.steps()
        scores = {step: self._score(step) for step in steps if self.store.manifest(step) is not None}
        kept = reasons_to_keep(scores, self.config)
        doomed = [step for step in steps if step not in kept and step < saved]
        for step in doomed:
            self.store.remove(step)
        if doomed:
            names = ", ".join(checkpoint_name(step) for step in doomed)
            log.info("mirror: removed %s; kept %s", names, shown_reasons(kept))

    def _score(self, step: int) -> float | None:
        if self.config.keep_best is None:
            return None
        if step not in self._scores:
            state = self.store.read_json(f"{checkpoint_name(step)}/{TRAIN_STATE_FILE}")
            self._scores[step] = score_of(state or {}, self.config)
        return self._scores[step]


def claim(store: MirrorStore, run_folder: Path) -> None:
    """Before a copy: the place is this run's, and says so. Raises ConfigError: it is another run's."""
    theirs = require_same_run(store, run_folder, whole_steps(run_folder / "checkpoints"))
    if _read_identity(run_folder) is None:
        _write_identity(run_folder, theirs or secrets.token_hex(8))
    if theirs is None:
        store.put_file(run_folder / IDENTITY_FILE, IDENTITY_FILE)


def require_same_run(store: MirrorStore, run_folder: Path, steps: Collection[int]) -> str | None:
    """That a mirror's place and a run folder are not of two runs with one name. Returns the identity there, if any.

    A folder without identity is the same run if it is empty, or if one of its whole checkpoints (`steps`) is there.

    Raises:
        ConfigError: they are of two runs.
        CheckpointError: the storage cannot be looked at.
    """
    theirs = (store.read_json(IDENTITY_FILE) or {}).get("run")
    own = _read_identity(run_folder)
    if theirs is None or own == theirs:
        return theirs
    folder = run_folder / "checkpoints"
    same = [step for step in steps if Manifest(folder / checkpoint_name(step)).content == store.manifest(step)]
    if own is not None or (steps and not same):
        raise ConfigError(
            f"{shown(store.url)} holds the copies of another run of this name, not those of {run_folder}; choose "
            "another run.name or checkpoints.mirror"
        )
    return theirs


def _read_identity(run_folder: Path) -> str | None:
    path = run_folder / IDENTITY_FILE
    return read_json(path).get("run") if path.exists() else None


def _write_identity(run_folder: Path, run: str) -> None:
    run_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run_folder / IDENTITY_FILE, json.dumps({"run": run}) + "\n")


def fetch_newer(mirror: str, run_folder: Path) -> Path | None:
    """At the start of a run, on rank 0: the newest complete checkpoint of the mirror, brought to the run folder if that
    has none, or older ones. None: the run folder's own is as new.

    Raises:
        CheckpointError: the mirror cannot be looked at, and the run folder has none to go on from either.
        ConfigError: the mirror holds another run of this name.
    """
    checkpoints = Path(run_folder) / "checkpoints"
    whole = whole_steps(checkpoints)
    own = max(whole, default=-1)
    store = MirrorStore(mirror_of(mirror, run_folder))
    try:
        theirs = require_same_run(store, Path(run_folder), whole)
        for step in reversed([step for step in store.steps() if step > own]):
            if store.complete_manifest(step) is None:
                continue
            try:
                found = store.fetch(step, checkpoints)
            except CheckpointError as error:
                log.warning("skipping the mirror's checkpoint: %s", error)
                continue
            store.fetch_side_folders(Path(run_folder))
            if theirs is not None:
                _write_identity(Path(run_folder), theirs)
            had = f"the newest here is of step {own}" if whole else "there is none here"
            log.info("fetched %s from %s: %s", found.name, shown(store.url), had)
            return found
    except CheckpointError as error:
        if not whole:
            raise CheckpointError(
                f"the mirror cannot be looked at, and {checkpoints} holds no checkpoint: {error}. Start again when the "
                "storage is there, or set checkpoints.mirror=null to start from step 0"
            ) from error
        log.warning("going on from step %d of this folder; the mirror cannot be looked at: %s", own, error)
    return None


def holds_checkpoints(mirror: str, run_folder: Path) -> bool:
    """Whether the mirror has a complete checkpoint of a run of this name."""
    store = MirrorStore(mirror_of(mirror, run_folder))
    return any(store.complete_manifest(step) is not None for step in reversed(store.steps()))


def local_checkpoint(name: str, verify: bool = True) -> Path:
    """What a user names, as a folder of this machine: a path as it is, a URL fetched into the cache first.

    Raises: as `fetch_named`.
    """
    if not is_remote(name):
        return Path(name)
    return fetch_named(name, Path(cache_root()) / "checkpoints" / name_of(name.rstrip("/")), verify)


def fetch_named(url: str, cache: Path, verify: bool = True) -> Path:
    """A checkpoint that a user names by URL, `MIRROR/RUN` (its newest) or `MIRROR/RUN/step-N`, brought below `cache`.

    What was fetched before is used again as long as the mirror's manifest is the same. verify: as `MirrorStore.fetch`.

    Raises:
        CheckpointError: there is none, or its bytes have changed.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    digits = name.removeprefix("step-")
    named = name.startswith("step-") and digits.isdigit()
    store = MirrorStore(parent if named else url)
    steps = [int(digits)] if named else list(reversed(store.steps()))
    for step in steps:
        manifest = store.complete_manifest(step) if verify else store.manifest(step)
        if manifest is None and verify:
            continue
        folder = cache / "checkpoints"
        here = folder / checkpoint_name(step)
        if verify and incomplete_reason(here) is None and _same_manifest(here, manifest):
            return here
        found = store.fetch(step, folder, verify)
        store.fetch_side_folders(cache)
        return found
    raise CheckpointError(
        f"there is no {'complete ' if verify else ''}checkpoint at {shown(url)}; expected MIRROR/RUN, MIRROR/RUN/step-N"
    )


def _same_manifest(folder: Path, manifest: dict[str, Any] | None) -> bool:
    return Manifest(folder).content == manifest
