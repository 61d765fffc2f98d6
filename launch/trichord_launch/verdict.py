"""What became of an attempt, and whether to start another: decided by the status files alone.

torchrun's own exit code says nothing: it is 1 whatever a rank died of, and 1 after a clean stop by a signal.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from trichord.core.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_UNEXPECTED, TrichordError
from trichord.core.status import Status, read_rank_statuses, read_status

NEVER_RESTARTED = (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT)
LOST_FILE = "lost.json"
_TAIL_BYTES = 65536


@dataclass(frozen=True)
class Verdict:
    """The outcome of an attempt. step: the last one known to be done, -1 if none; ranks: what failing ranks said.

    hosts_lost: host -> what became of the connection to it, of a job over ssh.
    """

    outcome: Literal["finished", "stopped", "failed"]
    exit_code: int
    step: int
    reason: str
    ranks: Mapping[int, Status] = field(default_factory=dict)
    hosts_lost: Mapping[str, str] = field(default_factory=dict)


def judge(folder: Path, signal_number: int | None = None, died: str = "") -> Verdict:
    """The verdict on the attempt that has just ended in run folder `folder`.

    signal_number: the signal the launcher was asked to stop with, if any.
    died: what torchrun saw (`first_death`); it only makes the reason clearer.

    The launcher has cleared the rank statuses and set `status.json` to running before the start, so whatever else it
    says comes from this attempt: finished and stopped are written by rank 0 when all ranks have agreed and the
    checkpoint is complete. A rank that knows what went wrong (config, data, checkpoint) is believed before one that
    only saw its peers go.
    """
    try:
        status, ranks = read_status(folder), read_rank_statuses(folder)
    except TrichordError as error:
        return Verdict("failed", EXIT_UNEXPECTED, last_metrics_step(folder), str(error))
    if status is not None and status.outcome in ("finished", "stopped"):
        return Verdict(status.outcome, status.exit_code, status.step, status.reason, ranks)
    said = [(f"rank {rank}: {s.reason}", s) for rank, s in ranks.items() if s.outcome == "failed"]
    if status is not None and status.outcome == "failed":
        said.insert(0, (status.reason, status))
    steps = [s.step for _, s in said] + ([status.step] if status is not None else [])
    step = max([*steps, last_metrics_step(folder)])
    if said:
        reason, cause = next((s for s in said if s[1].exit_code in NEVER_RESTARTED), said[0])
        if died and cause.exit_code not in NEVER_RESTARTED:
            reason = f"{died}; {reason}"
        return Verdict("failed", cause.exit_code or EXIT_UNEXPECTED, step, reason, ranks)
    if signal_number is not None:
        return Verdict("failed", 128 + signal_number, step, "interrupted before a checkpoint could be saved", ranks)
    return Verdict("failed", EXIT_UNEXPECTED, step, died or "the ranks died without a word", ranks)


def first_death(attempt_folder: Path) -> str:
    """`rank 1 died of SIGKILL`, if torchrun saw that the first rank to fail was ended by a signal; else empty."""
    try:
        files = [*attempt_folder.glob("torchrun/failures.json"), *attempt_folder.glob("torchrun/node-*/failures.json")]
        failures = [f for file in files for f in json.loads(file.read_text(encoding="utf-8"))["failures"]]
        first = min(failures, key=lambda failure: failure.get("timestamp", 0))
        rank, code = first["rank"], first["exitcode"]
        return f"rank {rank} died of {signal.Signals(-code).name}" if code < 0 else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""


def lost_hosts(attempt_folder: Path) -> dict[str, str]:
    """Host -> what became of the connection to it; empty where none was lost, or there were none."""
    try:
        lost = json.loads((attempt_folder / "hosts" / LOST_FILE).read_text(encoding="utf-8"))
        return {str(host): str(what) for host, what in lost.items()}
    except (OSError, ValueError, AttributeError):
        return {}


class Crash(Protocol):
    """Where an earlier attempt crashed."""

    @property
    def step(self) -> int: ...


def why_not_restart(
    verdict: Verdict, earlier: Sequence[Crash], max_restarts: int, interrupted: bool, same_step_limit: int = 2
) -> str | None:
    """The reason a failed attempt is the last, or None if the run is to be started again from its last checkpoint.

    earlier: the crashes of this launch so far. same_step_limit: this many at one step are no bad luck.
    """
    if interrupted:
        return "it was asked to stop"
    if verdict.exit_code in NEVER_RESTARTED:
        return f"exit code {verdict.exit_code} would come again"
    if sum(before.step == verdict.step for before in earlier) + 1 >= same_step_limit:
        times = "twice" if same_step_limit == 2 else f"{same_step_limit} times"
        return f"it failed {times} at step {verdict.step}"
    if len(earlier) >= max_restarts:
        return f"the budget of {max_restarts} restarts is used up" if max_restarts else "no restarts were asked for"
    return None


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl`; empty if there is none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}


def last_metrics_step(folder: Path) -> int:
    """The last step in `metrics.jsonl`, -1 if there is none: how far a run came that could not say so itself."""
    return last_metrics(folder).get("step", -1)
