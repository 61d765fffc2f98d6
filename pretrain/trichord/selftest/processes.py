"""Runs as a user would start them: the same commands, as processes of their own, and what kills them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import psutil

from trichord.checkpoints.load import find_latest
from trichord.core.errors import TrichordError
from trichord.core.log import get_logger

log = get_logger(__name__)

WAIT_LIMIT_S = 600.0


def train_here(arguments: list[str], output: Path) -> None:
    """`trichord train ...` in one process on all cores; raises TrichordError with the end of its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    _run([sys.executable, "-m", "trichord.cli", "train", *arguments], output, environment)


def train_by_launcher(arguments: list[str], procs: int, output: Path) -> None:
    """`trichord-launch local ... --procs N` to the end."""
    _run(_launch_command(arguments, procs), output)


def train_and_kill(arguments: list[str], procs: int, run_folder: Path, after_step: int, output: Path) -> int:
    """Start a run with the launcher and `kill -9` its last rank once a checkpoint of step `after_step` or later exists.

    Returns:
        The step of the newest checkpoint that was left behind.

    Raises:
        TrichordError: the run ended before it could be killed.
    """
    with open(output, "wb") as sink:
        launcher = subprocess.Popen(
            [*_launch_command(arguments, procs), "--max-restarts", "0"], stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            _wait_for_checkpoint(run_folder, after_step, launcher, output)
            _find_rank(launcher.pid, procs - 1).send_signal(signal.SIGKILL)
            launcher.wait(timeout=WAIT_LIMIT_S)
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait(timeout=60)
    if launcher.returncode == 0:
        raise TrichordError("the launcher reported success although a rank was killed; see " + str(output))
    latest = find_latest(run_folder / "checkpoints")
    assert latest is not None
    return int(latest.name.removeprefix("step-"))


class Moment(Protocol):
    """When to kill a run. told: what moment it was, known once it has come."""

    told: str

    def comes(self, launcher: subprocess.Popen) -> bool:
        """Wait for it; False where the run has ended. Asked again after a `holds` that was False."""
        ...

    def holds(self) -> bool:
        """Whether it still is that moment, asked when those to be killed stand still."""
        ...


def train_and_kill_at(arguments: list[str], procs: int, moment: Moment, rank: int | None, output: Path) -> bool:
    """Start a run with the launcher and `kill -9` it at a moment: one rank, or (None) every process, as a power cut.

    Returns:
        Whether it was killed; False where the run had ended by then, or had no ranks yet and a rank was asked for.
    """
    with open(output, "wb") as sink:
        command = [*_launch_command(arguments, procs), "--max-restarts", "0"]
        launcher = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            while moment.comes(launcher):
                victims = _stop_job(launcher) if rank is None else _stop_rank(launcher, rank)
                if not victims:
                    return False
                if moment.holds():
                    _send(victims, signal.SIGKILL)
                    launcher.wait(timeout=WAIT_LIMIT_S)
                    return True
                _send(victims, signal.SIGCONT)
            return False
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait(timeout=60)


def _stop_job(launcher: subprocess.Popen) -> list[psutil.Process]:
    """All of its processes, stopped before any is killed, so that none sees another die."""
    parent, known = psutil.Process(launcher.pid), []
    while new := [process for process in [parent, *parent.children(recursive=True)] if process not in known]:
        _send(new, signal.SIGSTOP)
        known += new
    return known


def _stop_rank(launcher: subprocess.Popen, rank: int) -> list[psutil.Process]:
    try:
        process = _find_rank(launcher.pid, rank)
        process.send_signal(signal.SIGSTOP)
    except (TrichordError, psutil.NoSuchProcess):
        return []
    return [process]


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _launch_command(arguments: list[str], procs: int) -> list[str]:
    return [sys.executable, "-m", "trichord_launch.cli", "local", *arguments, "--procs", str(procs)]


def _run(command: list[str], output: Path, environment: dict[str, str] | None = None) -> None:
    with open(output, "wb") as sink:
        done = subprocess.run(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment, timeout=WAIT_LIMIT_S, check=False
        )
    if done.returncode != 0:
        raise TrichordError(f"`{' '.join(command)}` left with {done.returncode}:\n{_tail(output)}\nall of it: {output}")


def _tail(output: Path, lines: int = 12) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-lines:])


def _wait_for_checkpoint(run_folder: Path, step: int, launcher: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_S
    while time.monotonic() < deadline:
        for path in (run_folder / "checkpoints").glob("step-*/manifest.json"):
            number = path.parent.name.removeprefix("step-")
            if number.isdigit() and int(number) >= step:
                return
        if launcher.poll() is not None:
            raise TrichordError(f"the run ended before step {step}, nothing to kill:\n{_tail(output)}")
        time.sleep(0.05)
    raise TrichordError(f"no checkpoint of step {step} after {WAIT_LIMIT_S:.0f} s:\n{_tail(output)}")


def _find_rank(launcher_pid: int, rank: int) -> psutil.Process:
    """The process of one rank among the launcher's own descendants."""
    for process in psutil.Process(launcher_pid).children(recursive=True):
        try:
            environment, command = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        if environment.get("RANK") == str(rank) and "trichord.cli" in " ".join(command):
            return process
    raise TrichordError(f"no process of rank {rank} below process {launcher_pid}")


def quiet_environment() -> None:
    """Two cores: one thread per process, and no accelerator to look for."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
