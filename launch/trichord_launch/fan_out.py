"""The connections of a job on hosts: `python -m trichord_launch.fan_out LOG_FOLDER HOST COMMAND [HOST COMMAND ...]`.

One ssh per host, all side by side. What a host prints goes to `LOG_FOLDER/HOST.log`; of the first host it is shown
here too. SIGTERM tells all hosts to save and stop, SIGINT to end at once. When one host has failed the ranks of the
others leave by themselves; those that have not by then are ended.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

_OTHERS_LEAVE_S = 60.0
_KILLED_WAIT_S = 15.0
_SIGN_OF_LIFE_S = 15.0
_SSH_FAILED = 255


class Connection:
    """One host: its ssh, and where its output goes."""

    def __init__(self, host: str, command: str, log: Path, shown: bool):
        self.host, self.log = host, log
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        copy = (self.process.stdout, log, shown)
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


def _copy(stream: BinaryIO, log: Path, shown: bool) -> None:
    """Reads on where it cannot write (a full disk, nobody looks any more): ranks wait for who does not read."""
    with open(log, "ab", buffering=0) as file:
        for line in stream:
            with contextlib.suppress(OSError):
                file.write(line)
            if shown:
                try:
                    os.write(1, line)
                except OSError:
                    shown = False


def run(folder: Path, commands: dict[str, str]) -> int:
    """Hold the connections until all hosts have ended; 0 if all have ended well."""
    folder.mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    for number, word in ((signal.SIGTERM, "stop"), (signal.SIGINT, "kill")):
        signal.signal(number, lambda _number, _frame, word=word: words.append(word))
    first = next(iter(commands))
    hosts = [Connection(host, command, folder / f"{host}.log", host == first) for host, command in commands.items()]
    kill_at: float | None = None
    next_sign = time.monotonic() + _SIGN_OF_LIFE_S
    while any(host.process.poll() is None for host in hosts):
        time.sleep(0.1)
        while words:
            word = words.pop(0)
            _tell(hosts, word)
            kill_at = time.monotonic() + _KILLED_WAIT_S if word == "kill" else kill_at
        if time.monotonic() > next_sign:
            _tell(hosts, "here")
            next_sign = time.monotonic() + _SIGN_OF_LIFE_S
        if kill_at is None and any(host.process.poll() for host in hosts):
            kill_at = time.monotonic() + _OTHERS_LEAVE_S
        if kill_at is not None and time.monotonic() > kill_at:
            _end(hosts)
    codes = {host.host: host.close() for host in hosts}
    for host in hosts:
        if codes[host.host]:
            _report(host, codes[host.host])
    return 0 if not any(codes.values()) else 1


def _tell(hosts: list[Connection], word: str) -> None:
    for host in hosts:
        host.say(word)


def _end(hosts: list[Connection]) -> None:
    """Have the agents kill; and let go of hosts that do not answer."""
    _tell(hosts, "kill")
    deadline = time.monotonic() + _KILLED_WAIT_S
    while any(host.process.poll() is None for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.1)
    for host in hosts:
        if host.process.poll() is None:
            host.process.kill()


def _report(host: Connection, code: int) -> None:
    said = host.log.read_text(errors="replace").splitlines()[-1:] if host.log.exists() else []
    what = "ssh could not reach it or lost it" if code == _SSH_FAILED else f"torchrun there ended with {code}"
    print(f"host {host.host}: {what}{f' ({said[0][:200]})' if said else ''}; see {host.log}", file=sys.stderr)


if __name__ == "__main__":
    pairs = sys.argv[2:]
    sys.exit(run(Path(sys.argv[1]), dict(zip(pairs[::2], pairs[1::2], strict=True))))
