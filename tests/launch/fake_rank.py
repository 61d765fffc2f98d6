"""A rank without torch, for the launcher's tests: counts steps in a file, and ends as it is told.

    fake_rank.py FOLDER PLAN [ignored ...]

PLAN is one word per start of the run, joined by commas; the last one holds for all further starts:
    finish      take steps to the end
    crash@N     die of SIGKILL at step N, without a word
    fail@N=C    say it failed at step N with exit code C, and leave
    wait        take steps until a signal, then save and say so
    deaf        never save: only a kill ends it
    dead        leave before having said anything
    litter      start a process that outlives it, then finish
Only rank 0 keeps the step file and speaks for the run. A start goes on from the last "checkpoint" (every 5 steps).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trichord.core.status import (
    Status,
    current_attempt,
    write_atomically,
    write_rank_status,
    write_status,
)

TOTAL_STEPS = 20


def main() -> int:
    folder, plan, rank = Path(sys.argv[1]), sys.argv[2].split(","), int(os.environ.get("RANK", "0"))
    word = plan[min(current_attempt(), len(plan)) - 1]
    if word == "dead":
        return 1
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    checkpoint = folder / f"checkpoint.{rank}"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if rank == 0:
        write_status(folder, Status("running", 0, step, attempt=current_attempt()))
    write_atomically(folder / f"ready.{rank}", f"{current_attempt()} {os.getpid()}")
    if word == "litter":
        litter = subprocess.Popen(["sleep", "60"], start_new_session=True)
        (folder / "litter").write_text(str(litter.pid))
    deadline = time.monotonic() + 60  # a test that failed leaves nothing running
    while (word in ("wait", "deaf") or step < TOTAL_STEPS) and time.monotonic() < deadline:
        step += 1
        end_here(folder, rank, word, step)
        if received and word != "deaf":
            (folder / f"signals.{rank}").write_text(str(len(received)))
            write_atomically(checkpoint, str(step))
            if rank == 0:
                write_status(folder, Status("stopped", 75, step, "stopped by SIGTERM with a checkpoint"))
            return 0
        if step % 5 == 0:
            write_atomically(checkpoint, str(step))
        time.sleep(0.01)
    if rank == 0:
        write_status(folder, Status("finished", 0, step, "all steps done"))
    return 0


def end_here(folder: Path, rank: int, word: str, step: int) -> None:
    """Crash or fail, if `word` says so for this step."""
    kind, _, rest = word.partition("@")
    at, _, code = rest.partition("=")
    if kind == "crash" and step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "fail" and step == int(at):
        write_rank_status(folder, rank, Status("failed", int(code), step, f"told to fail at step {step}"))
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
