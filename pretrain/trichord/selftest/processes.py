"""Runs as a user would start them: the same commands, as processes of their own, and what kills them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def train_and_kill_after(arguments: list[str], procs: int, seconds: float, whole_job: bool, output: Path) -> bool:
    """Start a run with the launcher and `kill -9` it after so many seconds: its last rank, or every process at once.

    Returns:
        Whether it was killed; False where the run had ended by then, or had no ranks yet and a rank was asked for.
    """
    with open(output, "wb") as sink:
        command = [*_launch_command(arguments, procs), "--max-restarts", "0"]
        launcher = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            launcher.wait(timeout=seconds)
            return False
        except subprocess.TimeoutExpired:
            killed = _kill_all(launcher) if whole_job else _kill_rank(launcher, procs - 1)
            launcher.wait(timeout=WAIT_LIMIT_S)
            return killed
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait(timeout=60)


def _kill_all(launcher: subprocess.Popen) -> bool:
    """As a power cut: stopped first, so that none of them sees another die."""
    job = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for send in (signal.SIGSTOP, signal.SIGKILL):
        for process in job:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(send)
    return True


def _kill_rank(launcher: subprocess.Popen, rank: int) -> bool:
    try:
        _find_rank(launcher.pid, rank).send_signal(signal.SIGKILL)
    except (TrichordError, psutil.NoSuchProcess):
        return False
    return True


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
