"""The connections of a job on hosts: `python -m trichord_launch.fan_out LOG_FOLDER BEGIN_S SAVE_S HOST COMMAND ...`.

One ssh per host, all side by side. What a host prints goes to `LOG_FOLDER/HOST.log`; of the first host it is shown
here too. SIGTERM tells all hosts to save and stop, SIGINT to end at once. When one host has failed the ranks of the
others leave by themselves; those that have not by then are ended. When a connection breaks, or a host's agent has not
begun within BEGIN_S, the others are to save and stop, as the ranks of that host are by its agent, and have SAVE_S for
it; `LOG_FOLDER/lost.json` names that host and says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from trichord.core.status import write_atomically
from trichord_launch.host_agent import BEGUN
from trichord_launch.verdict import LOST_FILE

_OTHERS_LEAVE_S = 60.0
_KILLED_WAIT_S = 15.0
_SIGN_OF_LIFE_S = 15.0
_SSH_FAILED = 255


class Connection:
    """One host: its ssh, and where its output goes. begun: its agent has spoken."""

    def __init__(self, host: str, command: str, log: Path, shown: bool):
        self.host, self.log = host, log
        self.begun = threading.Event()
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        copy = (self.process.stdout, log, shown, self.begun)
        self._copier = threading.Thread(target=_copy, args=copy, daemon=True)
        self._copier.start()

    def say(self, word: str) -> None:
        """`stop`, `kill` or `here`, to the agent there."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()

    def close(self) -> int:
        """Its exit code, once all it has printed is in its log."""
        code = self.process.wait()
        self._copier.join(timeout=5)
        return code

    @property
    def broke(self) -> bool:
        """ssh has ended, and not because what it had started did."""
        code = self.process.poll()
        return code is not None and (code == _SSH_FAILED or code < 0)

    def last_line(self) -> str:
        """Of its log, for a message; empty where it has said nothing."""
        lines = self.log.read_text(errors="replace").splitlines()[-1:] if self.log.exists() else []
        return f" ({lines[0][:200]})" if lines else ""


def _copy(stream: BinaryIO, log: Path, shown: bool, begun: threading.Event) -> None:
    """Reads on where it cannot write (a full disk, nobody looks any more): ranks wait for who does not read."""
    with open(log, "ab", buffering=0) as file:
        for line in stream:
            if line.strip() == BEGUN.encode():
                begun.set()
                continue
            with contextlib.suppress(OSError):
                file.write(line)
            if shown:
                try:
                    os.write(1, line)
                except OSError:
                    shown = False


class FanOut:
    """All connections. lost: host -> what became of its connection."""

    def __init__(self, folder: Path, begin_s: float, save_s: float, commands: dict[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.begin_s, self.save_s = folder, begin_s, save_s
        self.lost: dict[str, str] = {}
        self._words: list[str] = []
        self._kill_at: float | None = None
        for number, word in ((signal.SIGTERM, "stop"), (signal.SIGINT, "kill")):
            signal.signal(number, lambda _number, _frame, word=word: self._words.append(word))
        first = next(iter(commands))
        self.hosts = [
            Connection(host, words, folder / f"{host}.log", host == first) for host, words in commands.items()
        ]

    def run(self) -> int:
        """Hold the connections until all hosts have ended; 0 if all have ended well."""
        began = time.monotonic()
        next_sign = began + _SIGN_OF_LIFE_S
        while self._running():
            time.sleep(0.1)
            while self._words:
                self._pass_on(self._words.pop(0))
            if time.monotonic() > next_sign:
                self._tell("here")
                next_sign = time.monotonic() + _SIGN_OF_LIFE_S
            self._look_for_lost(late=time.monotonic() > began + self.begin_s)
            if self._kill_at is None and any(host.process.poll() for host in self.hosts):
                self._kill_at = time.monotonic() + _OTHERS_LEAVE_S
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._end()
                break
        else:
            self._look_for_lost(late=False)  # the last one to end
        codes = {host: host.close() for host in self.hosts}
        for host, code in codes.items():
            if code:
                what = self.lost.get(host.host) or f"torchrun there ended with {code}{host.last_line()}"
                print(f"host {host.host}: {what}; see {host.log}", file=sys.stderr)
        if self.lost:
            write_atomically(self.folder / LOST_FILE, json.dumps(self.lost) + "\n")
        return 0 if not any(codes.values()) else 1

    def _running(self) -> bool:
        return any(host.process.poll() is None for host in self.hosts)

    def _pass_on(self, word: str) -> None:
        self._tell(word)
        if word == "kill":
            self._kill_at = time.monotonic() + _KILLED_WAIT_S

    def _tell(self, word: str) -> None:
        for host in self.hosts:
            host.say(word)

    def _look_for_lost(self, late: bool) -> None:
        for host in self.hosts:
            if host.host in self.lost:
                continue
            if host.broke:
                what = "the connection to it broke" if host.begun.is_set() else "ssh could not reach it"
                self._lose(host, what + host.last_line())
            elif late and not host.begun.is_set() and host.process.poll() is None:
                host.process.kill()
                what = f"its modules and setup had not ended after {self.begin_s:g} s (node_check.timeout_s)"
                self._lose(host, what + host.last_line())

    def _lose(self, host: Connection, what: str) -> None:
        """Its agent, if there is one, has its ranks save and stop; those of the others have to do so with them."""
        self.lost[host.host] = what
        self._tell("stop")
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.save_s

    def _end(self) -> None:
        """Have the agents kill; and let go of hosts that do not answer."""
        self._tell("kill")
        deadline = time.monotonic() + _KILLED_WAIT_S
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.1)
        for host in self.hosts:
            if host.process.poll() is None:
                host.process.kill()


if __name__ == "__main__":
    folder, begin_s, save_s, *pairs = sys.argv[1:]
    commands = dict(zip(pairs[::2], pairs[1::2], strict=True))
    sys.exit(FanOut(Path(folder), float(begin_s), float(save_s), commands).run())
