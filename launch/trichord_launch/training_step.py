"""The step that trains, from its start to its end: a stop is passed on once, and a step that does not end is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from trichord.core.errors import TrichordError
from trichord.core.status import read_rank_statuses, read_status
from trichord_launch import scheduler
from trichord_launch.command import Command
from trichord_launch.decide import taken_away
from trichord_launch.record import STARTING, has_begun
from trichord_launch.supervise import StopSignals

_POLL_S = 0.2
_LOOK_EVERY_S = 5.0
_BEFORE_THE_END_S, _END_FRAC = 15.0, 0.2  # a requeue must be through before Slurm ends the job: the lesser of the two
_KILLED_WAIT_S = 90.0
# How long a step may go on after its status said how it ended: a dead node holds up srun until Slurm gives it up.
_END_LIMITS_S = {"failed": 120.0, "finished": 600.0, "stopped": 600.0}


class TrainingStep:
    """One srun that trains."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        command: Command,
        job_id: str,
        signals: StopSignals,
        say: Callable[[str], None],
    ):
        self.folder, self.attempt, self.command, self.job_id = folder, attempt, command, job_id
        self.signals, self.say = signals, say
        self._asked = False
        self._kill_at: float | None = None
        self._ended: tuple[str, float] | None = None

    def run(self) -> int | None:
        """Start it and wait for its end; returns srun's exit code, which decides nothing."""
        process = subprocess.Popen(
            self.command.argv, env={**os.environ, **self.command.environment}, stdin=subprocess.DEVNULL
        )
        look_at = time.monotonic() + _LOOK_EVERY_S
        while process.poll() is None:
            time.sleep(_POLL_S)
            if self.signals.received and not self._asked:
                self._asked = True
                self._pass_on_stop()
            if time.monotonic() >= look_at:
                self._look_for_an_end()
                look_at = time.monotonic() + _LOOK_EVERY_S
            if self._kill_at is not None and time.time() >= self._kill_at:
                self._kill(process)
        return process.returncode

    def _pass_on_stop(self) -> None:
        """Have the ranks save and stop; where they have not begun, there is nothing to save."""
        name = signal.Signals(self.signals.received[0]).name
        facts = scheduler.job_facts(self.job_id)
        if taken_away(facts.get("JobState", "")):
            self.say(f"{name}: Slurm is ending this start of the job and has told the ranks itself")
            return
        if not has_begun(self.folder, self.attempt):
            self.say(f"{name}: stopping before training began")
            self._kill_at = 0.0
            return
        self.say(f"{name}: asking the ranks to save and stop")
        if (end := scheduler.end_time(facts)) is not None:  # the time limit's, or that of the grace at a preemption
            self._kill_at = end - min(_BEFORE_THE_END_S, _END_FRAC * (end - time.time()))
        with _told(self.say):
            scheduler.signal_steps(self.job_id, "USR1")

    def _look_for_an_end(self) -> None:
        """Note when the ranks first say how it ended; if srun goes on for too long after that, it is to be killed."""
        outcome = self._outcome()
        if outcome is None or self._ended is not None:
            return
        self._ended = (outcome, time.time())
        limit = time.time() + _END_LIMITS_S[outcome]
        self._kill_at = limit if self._kill_at is None else min(limit, self._kill_at)

    def _outcome(self) -> str | None:
        with contextlib.suppress(TrichordError):
            status = read_status(self.folder)
            said = status is not None and status.attempt == self.attempt and status.reason != STARTING
            if status is not None and said and status.outcome != "running":
                return status.outcome
            if any(rank.outcome == "failed" for rank in read_rank_statuses(self.folder).values()):
                return "failed"
        return None

    def _kill(self, process: subprocess.Popen) -> None:
        """Kill the tasks; and srun itself, where a node that is gone keeps it."""
        self._kill_at = None
        self.say("killing what is left of the step")
        with _told(self.say):
            scheduler.kill_steps(self.job_id)
        try:
            process.wait(timeout=_KILLED_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def clear_stale_locks(folder: Path) -> None:
    """Compilers that were killed leave lock files, for which all that come after would wait for ever.

    folder: TORCH_EXTENSIONS_DIR of this job, which no living process uses.
    """
    for lock in folder.rglob("lock"):
        with contextlib.suppress(OSError):
            shutil.rmtree(lock) if lock.is_dir() else lock.unlink()


@contextlib.contextmanager
def _told(say: Callable[[str], None]):
    """An error of Slurm is told, and does not end the job."""
    try:
        yield
    except TrichordError as error:
        say(str(error))
