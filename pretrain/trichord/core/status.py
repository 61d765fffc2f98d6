"""The status contract: how a run tells the launcher, without exit codes, what became of it. No torch.

Under torchrun the exit codes of ranks are lost, so the verdict lives in the run folder:

    status.json          the run's outcome, written by rank 0
    status.rank-N.json   written by rank N when it fails, before it leaves

The launcher and the batch script decide by these files alone (`trichord_launch/verdict.py`).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from trichord.core.errors import TrichordError

Outcome = Literal["running", "finished", "stopped", "failed"]

STATUS_FILE = "status.json"
RANK_STATUS_GLOB = "status.rank-*.json"
_KINDS = {"exit_code": int, "step": int, "reason": str, "attempt": int, "time": (int, float)}


@dataclass(frozen=True)
class Status:
    """What became of a run, or of one rank of it.

    outcome: running | finished | stopped (on a signal, with a checkpoint) | failed.
    exit_code: the code the launcher leaves with (see core.errors); 0 while running.
    step: the last optimizer step that was done, -1 if none.
    reason: one line for a human.
    attempt: which start of the run this is, from 0; the launcher sets it in TRICHORD_ATTEMPT.
    time: seconds since the epoch at which it was written.
    """

    outcome: Outcome
    exit_code: int
    step: int
    reason: str = ""
    attempt: int = 0
    time: float = 0.0


def current_attempt() -> int:
    """The attempt number the launcher gave this process in TRICHORD_ATTEMPT; 0 where there is no launcher."""
    text = os.environ.get("TRICHORD_ATTEMPT", "0")
    return int(text) if text.isdigit() else 0


def write_status(folder: Path, status: Status) -> Path:
    """Replace `status.json` of a run folder atomically (temporary file, fsync, rename, fsync of the folder).

    A reader sees the old file or the new one, never a part, and after a power cut one of the two is there.
    """
    return _write(Path(folder) / STATUS_FILE, status)


def write_rank_status(folder: Path, rank: int, status: Status) -> Path:
    """Write `status.rank-N.json` atomically: what a failing rank says before it leaves."""
    return _write(Path(folder) / f"status.rank-{rank}.json", status)


def read_status(folder: Path) -> Status | None:
    """The run's status, or None if nothing was written yet.

    Raises:
        TrichordError: the file is there but is no status (somebody edited it).
    """
    path = Path(folder) / STATUS_FILE
    return _read(path) if path.exists() else None


def read_rank_statuses(folder: Path) -> dict[int, Status]:
    """The statuses of all ranks that failed, by rank."""
    paths = {path.stem.removeprefix("status.rank-"): path for path in Path(folder).glob(RANK_STATUS_GLOB)}
    statuses = {int(rank): _read(path) for rank, path in paths.items() if rank.isdecimal()}
    return dict(sorted(statuses.items()))


def clear_rank_statuses(folder: Path) -> None:
    """Remove the rank statuses of an earlier attempt, so that they are not taken for this one's."""
    for path in Path(folder).glob(RANK_STATUS_GLOB):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """Replace `path` by `text` so that a crash at any moment leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{secrets.token_hex(4)}.tmp"
    )  # several ranks and threads may write at once
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return path


def try_write(folder: Path) -> None:
    """Make the folder where it is not there, write a file in it and remove that. Raises OSError: it cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write-test-{secrets.token_hex(4)}"  # several ranks may try at once
    probe.write_bytes(b"")
    probe.unlink()


def fsync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk: a rename is not there for good before."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, status: Status) -> Path:
    if status.outcome not in get_args(Outcome):
        raise ValueError(f"outcome must be one of {get_args(Outcome)}, got {status.outcome!r}")
    values = asdict(status)
    values["time"] = status.time or time.time()
    return write_atomically(path, json.dumps(values) + "\n")


def _read(path: Path) -> Status:
    names = {field.name for field in fields(Status)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        status = Status(**{name: value for name, value in values.items() if name in names})
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(status, name), kinds):
                raise TypeError(f"{name} is {getattr(status, name)!r}")
    except OSError as error:
        raise TrichordError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise TrichordError(f"{path} is no status file ({error}); move it away and start the run again") from error
    if status.outcome not in get_args(Outcome):
        raise TrichordError(f"{path}: outcome must be one of {get_args(Outcome)}, got {status.outcome!r}")
    return status
