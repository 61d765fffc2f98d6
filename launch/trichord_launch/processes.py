"""The processes of a job: its ranks, to be asked to stop, and what is left of it, to be ended. Reads /proc (Linux).

`python -m trichord_launch.processes ID GRACE_S` ends what is left of the launch of that id on this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

LAUNCH_ID = "TRICHORD_LAUNCH_ID"  # every process of a job inherits it, and keeps it when its parent dies
_PR_SET_PDEATHSIG = 1


def ask_to_stop(runner: int) -> int:
    """Ask a job to save and stop: one SIGTERM to each rank; returns how many ranks were reached.

    The ranks themselves are asked, not torchrun: it would pass the signal on to all that the ranks have started too
    (data workers, W&B), kill ranks that take longer than its limit to save, and end with code 1. Before there are
    ranks, torchrun (`runner`) is ended.
    """
    ranks = ranks_of(runner)
    for pid in ranks or [runner]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return len(ranks)


def ranks_of(runner: int) -> list[int]:
    """Process ids of the ranks that torchrun (`runner`) has started."""
    return [pid for pid in _children(runner) if b"LOCAL_RANK" in _environment(pid)]


def end_leftovers(launch_id: str, grace_s: float) -> list[int]:
    """Kill what is left of a job once its torchrun is gone; processes that end by themselves within `grace_s` may.

    Killed ranks leave compilers running, and torchrun that is killed leaves its ranks.
    """
    deadline = time.monotonic() + grace_s
    while (left := processes_of(launch_id)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def processes_of(launch_id: str) -> list[int]:
    """All living processes that were started, however indirectly, by the launch of that id; not this one."""
    mark = f"{LAUNCH_ID}={launch_id}".encode()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and mark in _environment(pid).values() and _state(pid) != "Z"]


def die_with_launcher() -> Callable[[], None]:
    """For Popen's `preexec_fn`: the child gets SIGTERM when this process dies, so that a killed launcher leaves no job.

    torchrun passes it on, and the ranks save and stop.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: after it only system calls are safe
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _environment(pid: int) -> dict[bytes, bytes]:
    """Variable name -> whole `NAME=value` of a process; empty where it is gone or not ours."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return {entry.partition(b"=")[0]: entry for entry in entries if entry}


def _children(pid: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [child for child in pids if _stat(child)[1:2] == [str(pid)]]


def _state(pid: int) -> str:
    return (_stat(pid) or ["Z"])[0]


def _stat(pid: int) -> list[str]:
    """State, parent and so on: the fields after the name, which may itself hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    end_leftovers(sys.argv[1], float(sys.argv[2]))
