"""The life of a job on this machine: start it, pass on a stop, judge by status files, start again if that may help."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trichord.core.errors import ConfigError
from trichord_launch.command import Command
from trichord_launch.processes import LAUNCH_ID, ask_to_stop, die_with_launcher, end_leftovers
from trichord_launch.record import begin_attempt, end_attempt, last_known_step, next_attempt
from trichord_launch.verdict import Verdict, first_death, judge, lost_hosts, why_not_restart

LOCK_FILE = ".launch.lock"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

CommandOf = Callable[[int, bool], Command]
"""(attempt number, whether it is a restart) -> what to start."""


def ask_local_ranks(runner: int) -> str:
    """Ask the ranks below torchrun on this machine; what was done."""
    ranks = ask_to_stop(runner)
    return f"asked {ranks} ranks to save and stop" if ranks else "stopping before training began"


def tell(text: str) -> None:
    """To the user, who may be gone: of a closed terminal comes a SIGHUP, and then no line can be written."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Reach:
    """How the machines of a job are reached; the defaults are for a job on this one.

    prepare: looks at them before the first attempt, and may refuse; it ends early where a stop was received.
    ask: asks the ranks to save and stop (the id of the command's process in, what to tell the user out); kill: ends it.
    clear: before a restart, sees that nothing of the attempt is left on hosts that were lost; why not, or empty.
    """

    prepare: Callable[[StopSignals], None] = lambda _signals: None
    ask: Callable[[int], str] = ask_local_ranks
    kill: Callable[[subprocess.Popen], None] = subprocess.Popen.kill
    clear: Callable[[int, Verdict, StopSignals], str] = lambda _attempt, _verdict, _signals: ""


def supervise(
    folder: Path,
    command_of: CommandOf,
    *,
    max_restarts: int = 0,
    restart_pause_s: float = 2.0,
    leftover_grace_s: float = 5.0,
    reach: Reach | None = None,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = tell,
) -> Verdict:
    """Run attempts in run folder `folder` until one finishes, is stopped, or fails for good; return its verdict.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask the ranks to save and stop; a second Ctrl-C kills them.
    facts: what `command.json` says beside the command.

    Raises:
        ConfigError: another launcher holds the run, or the folder cannot be written.
    """
    failures: list[Verdict] = []
    reach = reach or Reach()
    with run_lock(folder), StopSignals() as signals:
        reach.prepare(signals)
        if signals.received:
            return _never_started(folder, signals, say)
        while True:
            attempt = next_attempt(folder)
            command = command_of(attempt, bool(failures))
            verdict = _run_attempt(folder, attempt, command, signals, leftover_grace_s, reach, facts or {}, say)
            lost = bool(verdict.hosts_lost) and not signals.received
            if verdict.outcome == "finished" or (verdict.outcome == "stopped" and not lost):
                return verdict
            say(f"attempt {attempt} {verdict.outcome} at step {verdict.step}: {verdict.reason}")
            why = why_not_restart(verdict, failures, max_restarts, bool(signals.received))
            why = why or reach.clear(attempt, verdict, signals)
            if why:
                again = "; the same command goes on, with --max-restarts N by itself" if lost else ""
                say(f"not started again: {why}{again}")
                return verdict
            failures.append(verdict)
            say(f"starting again from the last checkpoint ({len(failures)} of {max_restarts})")
            if signals.pause(restart_pause_s):
                return verdict


def _never_started(folder: Path, signals: StopSignals, say: Callable[[str], None]) -> Verdict:
    number = signals.received[0]
    say(f"{signal.Signals(number).name}: stopped before anything was started")
    return Verdict("failed", 128 + number, last_known_step(folder), "stopped before anything was started")


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder against other launchers; the system lets go of it when this process ends, however it ends.

    Raises:
        ConfigError: another launcher on this machine holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise ConfigError(f"run folder {folder} cannot be written ({error.strerror}); set run.root") from error
    with file:
        if not _lock(file, tries=10):
            file.seek(0)
            raise ConfigError(
                f"run folder {folder} is in use by another launcher ({file.read().strip() or 'unknown'}); "
                "stop that one, or give this run another run.name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a launcher on this machine holds the run."""
    try:
        with open(folder / LOCK_FILE, "r+", encoding="utf-8") as file:
            return not _lock(file, tries=1)
    except OSError:
        return False


def _lock(file: IO[str], tries: int) -> bool:
    """Try to lock an open file; several tries, since `is_held` locks it for an instant.

    True also on a file system that knows no locks.
    """
    for _ in range(tries):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return True
    return False


def _death_of(command: Command, returncode: int) -> str:
    """Ranks go on when their torchrun is killed; they are ended as leftovers."""
    name = "torchrun" if any("torchrun" in word for word in command.argv) else command.argv[0]
    return f"{name} died of {signal.Signals(-returncode).name}" if returncode < 0 else ""


def _run_attempt(
    folder: Path,
    attempt: int,
    command: Command,
    signals: StopSignals,
    leftover_grace_s: float,
    reach: Reach,
    facts: Mapping[str, Any],
    say: Callable[[str], None],
) -> Verdict:
    """One start, from its record to its verdict."""
    launch_id = secrets.token_hex(8)
    record = begin_attempt(folder, attempt, command, facts)
    started = time.monotonic()
    process = subprocess.Popen(
        command.argv,
        env={**os.environ, **command.environment, LAUNCH_ID: launch_id},
        start_new_session=True,  # a Ctrl-C on the terminal reaches this process only, which passes it on once
        preexec_fn=die_with_launcher(),
    )
    try:
        returncode = _wait(process, signals, reach, say)
    finally:
        if process.poll() is None:
            reach.kill(process)
            process.wait()
        leftovers = end_leftovers(launch_id, 0.0 if signals.kill else leftover_grace_s)
    if leftovers:
        say(f"ended {len(leftovers)} processes that the job had left running")
    lost = lost_hosts(record)
    died = first_death(record) or _told(lost) or _death_of(command, returncode)
    verdict = judge(folder, signals.received[0] if signals.received else None, died)
    verdict = _with_lost(verdict, {} if signals.received else lost)
    seconds = round(time.monotonic() - started, 3)
    end_attempt(folder, attempt, verdict, {"torchrun_exit_code": returncode, "seconds": seconds})
    return verdict


def _told(lost: Mapping[str, str]) -> str:
    return "; ".join(f"{host}: {what}" for host, what in lost.items())


def _with_lost(verdict: Verdict, lost: Mapping[str, str]) -> Verdict:
    """Of ranks that saved because their launcher seemed gone, nobody else would say why."""
    if verdict.outcome != "stopped" or not lost:
        return replace(verdict, hosts_lost=lost)
    return replace(verdict, hosts_lost=lost, reason=f"{verdict.reason}, since {_told(lost)}")


def _wait(
    process: subprocess.Popen,
    signals: StopSignals,
    reach: Reach,
    say: Callable[[str], None],
) -> int:
    """Wait for torchrun; pass the first signal on as save-and-stop, and kill on a second Ctrl-C."""
    asked = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.1)
        if signals.received and not asked:
            asked = True
            say(f"{signal.Signals(signals.received[0]).name}: {reach.ask(process.pid)}")
        if signals.kill:
            say("Ctrl-C again: killing the job")
            reach.kill(process)
            return process.wait()


class StopSignals:
    """Collects stop signals while it is entered. received: their numbers in order.

    ignored_too: also those that this process was started to ignore (nohup and background jobs: they are not for us).
    """

    def __init__(self, numbers: Sequence[int] = STOP_SIGNALS, ignored_too: bool = False) -> None:
        self.received: list[int] = []
        self._numbers, self._ignored_too = numbers, ignored_too
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self._numbers:
            if self._ignored_too or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda received, _frame: self.received.append(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @property
    def kill(self) -> bool:
        """Ctrl-C was pressed twice: nobody wants to wait for a checkpoint."""
        return self.received.count(signal.SIGINT) > 1

    def pause(self, seconds: float) -> bool:
        """Sleep, but not past a signal; True if one came."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(self.received)
