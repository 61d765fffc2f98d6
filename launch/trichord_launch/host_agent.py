"""What ssh starts on a host: `python -m trichord_launch.host_agent ID PYTHON-WORDS ...`, around torchrun.

ID marks what it starts, so that the launcher can see later that nothing is left of it. It says first that it has begun:
what the cluster file asks for on a host is done by then. It reads what the launcher says from its input: a line `stop`
asks the ranks to save and stop, `kill` ends them, `here` is a sign of life. Where the connection is gone or silent, so
is the launcher: the ranks are asked to save and stop, as when a launcher on their own machine dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from trichord_launch.node import threads_per_rank
from trichord_launch.processes import LAUNCH_ID, ask_to_stop, die_with_launcher, end_leftovers, ranks_of

BEGUN = "trichord-launch: the agent has begun"
_LEFTOVER_GRACE_S = 5.0
_BARRIER_S = 60.0  # torchrun whose ranks have gone waits for those of other hosts, for minutes where they died
_SILENCE_S = 120.0  # a network that is cut breaks no connection: only silence tells


class Agent:
    """Holds one torchrun on this host."""

    def __init__(self, launch_id: str, words: list[str]):
        self._launch_id = launch_id
        self._killed = False
        self._asked = threading.Lock()  # held once the ranks have been asked
        self._asked_at = float("inf")
        self._heard = time.monotonic()
        environ = {**os.environ, LAUNCH_ID: self._launch_id}
        environ["OMP_NUM_THREADS"] = threads_per_rank(environ, len(os.sched_getaffinity(0)))
        tools = os.path.dirname(os.path.abspath(sys.executable))  # ninja, which DeepSpeed calls by name
        environ["PATH"] = f"{tools}:{environ.get('PATH', '')}"
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,  # the end of the ssh session is no signal to the ranks
            preexec_fn=die_with_launcher(),
        )

    def listen(self, lines: Iterable[str]) -> None:
        """Do what the launcher says, until it says nothing more."""
        for line in lines:
            self._heard = time.monotonic()
            if line.strip() == "stop":
                self._stop("asked to stop")
            elif line.strip() == "kill":
                return self._kill()
        self._stop("the launcher is gone")

    def wait(self) -> int:
        """Until torchrun has ended, and nothing of it is left; returns its exit code."""
        while (code := self._until_it_ends(1.0)) is None:
            if time.monotonic() - self._heard > _SILENCE_S:
                self._stop("nothing is heard of the launcher")
            if time.monotonic() - self._asked_at > _BARRIER_S and not ranks_of(self._process.pid):
                self._process.kill()
        left = end_leftovers(self._launch_id, 0.0 if self._killed else _LEFTOVER_GRACE_S)
        if left:
            _say(f"ended {len(left)} processes that the job had left running")
        return code

    def _until_it_ends(self, limit_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(limit_s)
        return None

    def _stop(self, why: str) -> None:
        """Once only: a rank that is asked twice would be interrupted while it saves."""
        if self._process.poll() is None and self._asked.acquire(blocking=False):
            self._asked_at = time.monotonic()
            ranks = ask_to_stop(self._process.pid)
            _say(f"{why}: {ranks} ranks are to save and stop" if ranks else f"{why}: before training began")

    def _kill(self) -> None:
        self._killed = True
        self._process.kill()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        print(f"trichord-launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Until torchrun has ended."""
    for number in (signal.SIGHUP, signal.SIGPIPE):  # what sshd sends when the connection breaks
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        print(BEGUN, flush=True)
    agent = Agent(sys.argv[1], sys.argv[2:])
    threading.Thread(target=agent.listen, args=(sys.stdin,), daemon=True).start()
    code = agent.wait()
    os._exit(code if code >= 0 else 128 - code)  # the thread may be waiting for a line


if __name__ == "__main__":
    sys.exit(main())
