"""A process that takes cases, one after the other, until one of them ends it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import time
import traceback
import uuid
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from trichord.core.processes import STOP_SIGNALS, die_with_parent
from trichord.inspection.fuzz.case import Case, make_case, write_case
from trichord.inspection.fuzz.guard import Guard, enter_sandbox, has_children, peak_mib, sweep
from trichord.inspection.fuzz.road import Outcome, drive

TWICE_EVERY = 8
"""One case in so many is driven again over the sidecars that are there by then, and must end the same."""


@dataclass(frozen=True)
class Verdict:
    """What one case did. seconds: wall clock of one drive; peak_mib: of the process so far; trace: of a fault."""

    number: int
    families: tuple[str, ...]
    outcome: Outcome
    seconds: float
    peak_mib: float
    trace: str = ""


def serve(parent_pid: int, connection: Connection, root: Path, tokenizer: str, seed: int, max_bytes: int) -> None:
    """Answer each case number with a `Verdict`; None ends the process. The first answer, `-1`, is that all is warm.

    Signals to stop are the parent's business, with which this process ends, however that does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    die_with_parent(parent_pid)
    root.mkdir(parents=True)
    log = os.open(root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)  # decoders in C print to these
    os.dup2(log, 2)
    faulthandler.enable(log)
    logging.disable(logging.CRITICAL)
    guard = Guard(root, (Path(tokenizer),))
    _judge(guard, root, tokenizer, make_case(seed, -1))  # every lazy import happens here, before memory is bounded
    enter_sandbox(root, max_bytes)
    connection.send(_judge(guard, root, tokenizer, make_case(seed, -1)))
    with contextlib.suppress(EOFError):
        while (number := connection.recv()) is not None:
            os.ftruncate(log, 0)
            connection.send(_judge(guard, root, tokenizer, make_case(seed, number)))


def _judge(guard: Guard, root: Path, tokenizer: str, case: Case) -> Verdict:
    folder = root / "case" / uuid.uuid4().hex  # one address, one shard: open files are kept by address
    folder.mkdir(parents=True)
    shard = write_case(case, folder)
    guard.breaches.clear()
    guard.armed = True
    started = time.monotonic()
    trace = ""
    try:
        outcome = drive(str(shard), tokenizer, case.options, str(root / "cache"))
        seconds = time.monotonic() - started
        if case.number % TWICE_EVERY == 0 and case.sidecar_seed is None:  # false sidecars are made anew in between
            again = drive(str(shard), tokenizer, case.options, str(root / "cache"))
            if again != outcome:
                outcome = Outcome("fault", detail=f"the second reading differs: {outcome} and then {again}")
    except Exception as error:
        seconds = time.monotonic() - started
        outcome = Outcome("fault", detail=f"{type(error).__name__}: {str(error)[:500]}")
        trace = traceback.format_exc()[-6000:]
    finally:
        guard.armed = False
    if guard.breaches:
        outcome = Outcome("fault", detail="reached outside: " + "; ".join(guard.breaches[:5]))
    if has_children():
        outcome = Outcome("fault", detail="started a process")
    strangers = [name for name in sweep(root, case.shard_name) if name != "stderr"]
    if strangers:
        outcome = Outcome("fault", detail=f"files that nobody asked for: {strangers[:5]}")
    return Verdict(case.number, case.families, outcome, seconds, peak_mib(), trace)
