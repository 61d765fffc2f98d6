"""What is written down of each start of a run, under `attempts/K/`: before it, and when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trichord.core.errors import TrichordError
from trichord.core.status import Status, clear_rank_statuses, read_status, write_atomically, write_status
from trichord_launch.command import Command
from trichord_launch.verdict import Verdict, last_metrics_step

OF_A_RUN = (
    *("status.json", "config.yaml", "metrics.jsonl", "attempts", "checkpoints", "submissions", "preflight"),
    *("hosts_check", ".launch.lock"),
)
STARTING = "starting"  # the reason in status.json until rank 0 has something to say


@dataclass(frozen=True)
class PastAttempt:
    """An attempt that has ended. lost: nobody was left to judge it (the node of the batch process died).

    crashed: the ranks failed by themselves, nobody had asked them to stop or taken their nodes away.
    """

    attempt: int
    outcome: str
    exit_code: int
    step: int
    crashed: bool
    lost: bool = False


def is_run_folder(folder: Path) -> bool:
    """Whether anything that belongs to a run is in it."""
    return any((folder / name).exists() for name in OF_A_RUN)


def next_attempt(folder: Path) -> int:
    """The number of the next start: one more than the largest under `attempts/`, from 1."""
    return max(attempt_numbers(folder), default=0) + 1


def attempt_numbers(folder: Path) -> list[int]:
    """Numbers of all starts of the run so far, in order."""
    attempts = folder / "attempts"
    return sorted(int(path.name) for path in attempts.iterdir() if path.name.isdigit()) if attempts.is_dir() else []


def begin_attempt(folder: Path, attempt: int, command: Command, more: Mapping[str, Any] | None = None) -> Path:
    """Write down what is started, and set the status so that anything else it says later comes from this attempt.

    more: facts for `command.json`, such as the job that it is part of. Returns `attempts/K`.
    """
    record = folder / "attempts" / str(attempt)
    facts = {
        "attempt": attempt,
        "argv": command.argv,
        "environment": dict(command.environment),
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "time": time.time(),
        **(more or {}),
    }
    write_atomically(record / "command.json", json.dumps(facts, indent=2) + "\n")
    clear_rank_statuses(folder)
    write_status(folder, Status("running", 0, last_known_step(folder), STARTING, attempt))
    return record


def end_attempt(folder: Path, attempt: int, verdict: Verdict, more: Mapping[str, Any]) -> None:
    """Keep the verdict with the attempt, and in `status.json` where the ranks could not write one."""
    facts = {**asdict(verdict), **more, "time": time.time()}
    write_atomically(folder / "attempts" / str(attempt) / "verdict.json", json.dumps(facts, indent=2) + "\n")
    if verdict.outcome == "failed" or not _said(folder, verdict.outcome):
        write_status(folder, Status(verdict.outcome, verdict.exit_code, verdict.step, verdict.reason, attempt))


def has_begun(folder: Path, attempt: int) -> bool:
    """Whether the ranks of this attempt train already, and so have something to save."""
    with contextlib.suppress(TrichordError):
        status = read_status(folder)
        return status is not None and status.attempt == attempt and status.reason != STARTING
    return False


def last_known_step(folder: Path) -> int:
    """How far the run has come, by its status and its metrics; -1 where neither says."""
    with contextlib.suppress(TrichordError):  # a status file somebody broke
        status = read_status(folder)
        return max(status.step if status else -1, last_metrics_step(folder))
    return last_metrics_step(folder)


def past_attempts(folder: Path, submission: str) -> list[PastAttempt]:
    """What became of the attempts that a submission has started so far, in order.

    One without a verdict is lost: call this only while none runs.
    """
    found = []
    for attempt in attempt_numbers(folder):
        record = folder / "attempts" / str(attempt)
        if read_json(record / "command.json").get("submission") != submission:
            continue
        verdict = read_json(record / "verdict.json")
        if not verdict:
            found.append(PastAttempt(attempt, "failed", 1, -1, crashed=False, lost=True))
            continue
        crashed = bool(verdict.get("crashed"))
        found.append(PastAttempt(attempt, verdict["outcome"], verdict["exit_code"], verdict["step"], crashed))
    return found


def _said(folder: Path, outcome: str) -> bool:
    with contextlib.suppress(TrichordError):
        status = read_status(folder)
        return status is not None and status.outcome == outcome
    return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
