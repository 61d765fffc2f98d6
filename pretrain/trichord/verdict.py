"""What became of a run: its status files, the event of its end, the last message in each rank's log.

Whoever notices a fault first writes for the run, whichever rank it is, since rank 0 may be the dead one: the first to
make `attempts/K/fault.json` appends the event and sets `status.json`. Each rank that fails writes its own status.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from trichord.config.identity import RunFolder, run_path
from trichord.config.run import RunConfig
from trichord.core.dist import rank_facts
from trichord.core.errors import EXIT_DONE, EXIT_STOPPED, EXIT_UNEXPECTED, ConfigError, StoppedError, TrichordError
from trichord.core.log import FILE_ONLY, get_logger
from trichord.core.status import Status, write_atomically, write_rank_status, write_status
from trichord.engine.fault import Fault, FaultError, is_broken_collective, readable
from trichord.engine.watch import PeerWatch
from trichord.tracking.metrics import append_event
from trichord.tracking.recorder import Recorder

log = get_logger(__name__)

LOCK_FILE = ".train.lock"
FAULT_FILE = "fault.json"
RESERVE_BYTES = 32768


@dataclass(frozen=True)
class Ending:
    """How a run came to its end, in the order of its event. signal: name of the one it was stopped by."""

    finished: bool
    reason: str
    signal: str | None

    @property
    def code(self) -> int:
        return EXIT_DONE if self.finished else EXIT_STOPPED


def ending_of(step: int, total_steps: int, *, used_up: bool, signal_name: str | None = None) -> Ending | None:
    """Whether the run ends after `step`, and why; the same on all ranks. None: it goes on.

    Args:
        used_up: no lane has a sample left. signal_name: of what a rank was told to stop by.
    """
    if used_up:  # first: more steps would not help
        return Ending(True, f"all sources used up at step {step} (run.max_steps {total_steps})", signal_name)
    if step >= total_steps:
        return Ending(True, "all steps done", signal_name)
    return None if signal_name is None else Ending(False, f"stopped by {signal_name} with a checkpoint", signal_name)


class Verdict:
    """Writes what became of the run; every rank has one."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = run_path(config)
        self.attempt = 0
        self.step = 0
        self.rank = rank_facts().rank
        self.watch: PeerWatch | None = None
        self.recorder: Recorder | None = None  # once there is one: it tells of a failure outside, too
        self._problem = ""
        self._lock: IO[str] | None = None
        self._begun = False  # until the folder is known to be ours, its status.json may be another run's
        self._reserve: Path | None = None
        self._said: Fault | None = None
        self._writing = threading.Lock()  # the watcher's thread and the main thread may both come to an end

    def hold(self, folder: Path) -> None:
        """Rank 0: keep the run folder to this process; the system lets go of it when the process ends, however it ends.

        Raises:
            ConfigError: another process on this machine is training this run, or the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  (held until `release`)
        except OSError as error:
            raise ConfigError(f"run folder {folder} cannot be written: {error}; choose another run.root") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run folder {folder} is being trained by another process; stop that one, or choose another run.name"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("cannot lock %s: %s; take care that no other process trains this run", folder, error)

    def release(self) -> None:
        self._free_reserve()
        if self._lock is not None:
            self._lock.close()

    def begin(self, folder: RunFolder, step: int) -> PeerWatch:
        """The folder is this run's: its status may be written, and the ranks watch each other from here on."""
        self.folder, self.attempt, self.step = folder.path, folder.attempt, step
        self._begun = True
        if self.rank == 0:
            self._run("running", EXIT_DONE, "")
        self._keep_reserve()
        self.watch = PeerWatch(self.config.engine, self).start()
        return self.watch

    def ended(self, ending: Ending, saved: bool) -> None:
        """The loop is over; without its last checkpoint the run has failed, whatever ended the loop."""
        if not saved:
            why = self._problem or "see the log of rank 0"
            raise TrichordError(f"the last checkpoint (step {self.step}) could not be written: {why}")
        if self.rank == 0:
            self._run("finished" if ending.finished else "stopped", ending.code, ending.reason)

    def stopped_early(self, told: StoppedError) -> None:
        """A signal came before the first step; all ranks know it."""
        if self.watch is not None:
            self.watch.stop()
        if self.rank == 0:
            log.info("%s", told)
            self._event("end", {"checkpoint_saved": False, "finished": False, "reason": str(told)})
            self._run("stopped", told.exit_code, str(told))

    def not_saved(self, step: int, problem: str) -> None:
        """On rank 0: a checkpoint was abandoned. The run goes on, and has the one before."""
        self._problem = problem
        self._event("checkpoint_failed", {"checkpoint": step, "reason": problem})

    def failed(self, error: BaseException) -> BaseException:
        """An exception on this rank ends the run. Returns what to raise: one message where a user can act on it."""
        if self.watch is not None and is_broken_collective(error):
            fault = self._record(self.watch.cause_of(error), None)
            told: BaseException = FaultError(fault.reason, fault.code)
        else:
            told = readable(error, self.config.engine, self.config.batches.micro_rows)
            code = told.exit_code if isinstance(told, TrichordError) else EXIT_UNEXPECTED
            reason = str(told) if isinstance(told, TrichordError) else f"{type(told).__name__}: {told}"
            fault = Fault("error", reason, code, self.rank)
            if self.watch is not None:
                self.watch.tell(fault)
            self._record(fault, None if isinstance(told, TrichordError) else told)
        if self.watch is not None:
            self.watch.linger()
        return told

    def lost(self, fault: Fault) -> None:
        """Called by the watcher's thread just before it leaves."""
        self._record(fault, None)

    def slow(self, report: str, table: Sequence[str]) -> None:
        """A step that takes long, before it is called stuck."""
        log.warning("%s", "\n  ".join([report, *table]))
        self._event("slow", {"reason": report, "ranks": list(table)})

    def _record(self, fault: Fault, trace: BaseException | None) -> Fault:
        """Write what ended this process, once; the other of its two threads waits for that. Returns what was written,
        which is what another rank says, where this one only lost its peers."""
        with self._writing:
            if self._said is None:
                self._said = self._write(fault, trace)
                if self.recorder is not None:
                    self.recorder.failed(self._said.reason)
            return self._said

    def _write(self, fault: Fault, trace: BaseException | None) -> Fault:
        """The log and this rank's status; for the run, if nobody has done so, its status and event."""
        first = self._begun and self._first()
        if fault.kind == "lost" and self._begun and not first:
            fault = self._written() or fault
        if first:
            said = fault.to_json() + "\n"
            self._try("the fault", lambda: write_atomically(self._fault_file, said))
        whose = f"rank {fault.rank}: " if fault.kind == "error" and fault.rank not in (None, self.rank) else ""
        reason = whose + fault.reason
        # On stderr the process's own end says it; a watcher's has no other words.
        extra = FILE_ONLY if fault.kind == "error" and fault.rank == self.rank else None
        log.error("leaving without saving: %s", "\n  ".join([reason, *fault.table]), exc_info=trace, extra=extra)
        self._rank(fault.code, reason)
        if not first:
            return fault
        self._run("failed", fault.code, reason)
        facts = {"rank": fault.rank, "stuck": list(fault.stuck), "ranks": list(fault.table)}
        known = {name: value for name, value in facts.items() if value not in (None, [])}
        self._event(
            "fault", {"fault": fault.kind, "reason": reason, "code": fault.code, "noticed_by": self.rank, **known}
        )
        return fault

    def _first(self) -> bool:
        """Whether no other rank has written of the end of this attempt. Where nothing can be written, rank 0 tries."""
        self._free_reserve()
        try:
            os.close(os.open(self._fault_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        except OSError as error:
            log.error("cannot write %s: %s", self._fault_file, error)
            return self.rank == 0
        return True

    def _written(self) -> Fault | None:
        """What the first rank wrote."""
        for _ in range(20):  # it may be at it
            with suppress(OSError, ValueError, TypeError, KeyError):
                return Fault.from_json(self._fault_file.read_text(encoding="utf-8"))
            time.sleep(0.05)
        return None

    @property
    def _fault_file(self) -> Path:
        return self.folder / "attempts" / str(self.attempt) / FAULT_FILE

    def _keep_reserve(self) -> None:
        """A few blocks of the disk for this rank's last words, should it be full then. Those of earlier attempts go."""
        if self.rank == 0:
            for left in self.folder.glob("attempts/*/.reserve-*"):
                if left.parent.name != str(self.attempt):
                    left.unlink(missing_ok=True)
        path = self.folder / "attempts" / str(self.attempt) / f".reserve-{self.rank:05d}"
        with suppress(OSError):
            path.write_bytes(os.urandom(RESERVE_BYTES))  # no zeros: file systems leave those out
            self._reserve = path

    def _free_reserve(self) -> None:
        if self._reserve is not None:
            with suppress(OSError):
                self._reserve.unlink(missing_ok=True)

    def _event(self, kind: str, facts: dict[str, Any]) -> None:
        event = partial(append_event, self.folder, kind, step=self.step, attempt=self.attempt, **facts)
        self._try("the event", event)

    def _rank(self, code: int, reason: str) -> None:
        status = self._status("failed", code, reason)
        self._try("the status of this rank", lambda: write_rank_status(self.folder, self.rank, status))

    def _run(self, outcome: Any, code: int, reason: str) -> None:
        status = self._status(outcome, code, reason)
        self._try("the status of the run", lambda: write_status(self.folder, status))

    def _try(self, what: str, write: Callable[[], object]) -> None:
        """A disk that is full or gone may be what ended the run: it must not hide that."""
        try:
            write()
        except OSError as error:
            log.error("cannot write %s in %s: %s", what, self.folder, error)

    def _status(self, outcome: Any, code: int, reason: str) -> Status:
        return Status(outcome, code, self.step, reason, self.attempt, time.time())
