"""The folder in which a build lives until it is done: locked, kept when the build is cut off, gone when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError

PLAN_FILE = "plan.json"
_LOCK_FILE = "lock"
_MAX_NAMED = 3


@contextmanager
def partial_folder(out_dir: Path, prefix: str, of: dict[str, Any], keep: bool) -> Iterator[Path]:
    """`OUT/.PREFIX.partial`, for one process at a time. keep: what has a plan stays there when the build fails.

    Args:
        of: what is built, as JSON; a plan in the folder must be of the same.

    Raises:
        ConfigError: it cannot be written, another process is at work in it, or it holds a build of something else.
    """
    folder = out_dir / (f".{prefix}.partial" if keep else f".{prefix}.partial-{os.getpid()}")
    done = folder.with_name(f"{folder.name}.done")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {out_dir}: {error.strerror}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process builds in {folder}; wait for it, or choose another --prefix") from error
        shutil.rmtree(done, ignore_errors=True)
        for rest in folder.glob("*.tmp"):
            rest.unlink(missing_ok=True)
        _refuse_other(folder, of)
        try:
            yield folder
        except BaseException:
            if not keep or not (folder / PLAN_FILE).exists():
                shutil.rmtree(folder)
            raise
        folder.rename(done)  # at once: half of the folder must not be taken for a build
        shutil.rmtree(done)


def refuse_taken(folder: Path, prefix: str) -> None:
    """Raises ConfigError where the folder holds shards of that prefix."""
    taken = sorted(folder.glob(f"{prefix}-*.tar"))
    if taken:
        raise ConfigError(f"{taken[0]} is there already; choose another folder or prefix, or delete the old shards")


def finished_shards(folder: Path) -> int:
    """How many shards in a partial folder are whole."""
    return len(list(folder.glob("[0-9]*.json")))


def after_bad_source(folder: Path) -> str:
    """How to go on once the source is mended, of which the plan knows nothing; a plan that saves nothing is dropped."""
    finished = finished_shards(folder)
    if not finished:
        (folder / PLAN_FILE).unlink()  # what has no plan is not kept
        return "; no shard is finished yet: the same command lists the source anew"
    return (
        "; the same command goes on with the source as it was listed; to list a changed one anew, remove the half-done "
        f"build: rm -r {folder} (finished shards that go with it: {finished})"
    )


def stopped_words(out_dir: Path, prefix: str) -> str:
    """What is there of a build that was stopped, and what to do."""
    folder = out_dir / f".{prefix}.partial"
    try:
        shards = len(json.loads((folder / PLAN_FILE).read_text())["shards"])
    except (OSError, ValueError, LookupError):
        return f"stopped; {out_dir} holds no half-done build of that prefix; the same command begins anew"
    return f"stopped; {finished_shards(folder)} of {shards} shards are there (in {folder}); the same command goes on"


def _refuse_other(folder: Path, of: dict[str, Any]) -> None:
    """A half-done build goes on only as what it began as."""
    if not (folder / PLAN_FILE).exists():
        return
    began = json.loads((folder / PLAN_FILE).read_text())["of"]
    differing = _differences(began, json.loads(json.dumps(of)))
    if differing:
        raise ConfigError(
            f"{folder} holds a half-done build of something else: {'; '.join(differing[:_MAX_NAMED])}; repeat that "
            f"command to finish it, or remove it (rm -r {folder}) to begin anew"
        )


def _differences(began: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(began, dict) and isinstance(now, dict):
        keys = sorted({*began, *now})
        return [text for key in keys for text in _differences(began.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if began == now else [f"{name} was {began!r} and is {now!r}"]
