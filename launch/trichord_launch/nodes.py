"""The nodes of a job: looked at before ranks are started on them, and left out where they are not fit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trichord_launch.job import SlurmJob
from trichord_launch.node_problems import Asked, Report, bad_nodes
from trichord_launch.record import read_json
from trichord_launch.steps import check_step


def check_nodes(
    job: SlurmJob,
    nodes: Sequence[str],
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Run the node check on all nodes at once; node -> why it is not fit. Arguments as of `ask_nodes`."""
    return bad_nodes(*ask_nodes(job, nodes, folder, stopped))


def ask_nodes(
    job: SlurmJob,
    nodes: Sequence[str],
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Report | None], Asked]:
    """What each node says of itself (None: nothing), and when it was asked.

    Where none answers (Slurm starts no step at all while one node is gone), each is asked alone.
    folder: gets `NODE.json` and what each task printed. stopped: whether to give up waiting.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    _run_steps([check_step(job, folder).argv], folder, job.check.timeout_s, stopped)
    reports = _reports(folder, nodes)
    if not any(reports.values()) and not stopped():
        commands = [check_step(job, folder, [node]).argv for node in nodes]
        _run_steps(commands, folder, job.check.timeout_s, stopped)
        reports = _reports(folder, nodes)
    return reports, Asked(began, time.time(), job.check.max_clock_skew_s)


def too_many(bad: Mapping[str, str], excluded: Sequence[str], nodes: Sequence[str]) -> bool:
    """Whether it is not the nodes that are at fault: all fail, or one after the other does."""
    all_of_several = len(nodes) > 1 and len(bad) == len(nodes)
    return all_of_several or len({*bad, *excluded}) > max(2, len(nodes) // 2)


def _reports(folder: Path, nodes: Sequence[str]) -> dict[str, Report | None]:
    return {node: read_json(folder / f"{node}.json") or None for node in nodes}


def _run_steps(commands: Sequence[Sequence[str]], folder: Path, timeout_s: float, stopped: Callable[[], bool]) -> None:
    """Run them side by side; what has not ended by then, or when a stop is asked for, is killed."""
    with open(folder / "srun.log", "ab") as log:
        processes = [
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) for argv in commands
        ]
        waited = 0.0
        while waited < timeout_s and not stopped() and any(process.poll() is None for process in processes):
            waited += _nap(processes)
        for process in processes:
            process.kill()
            process.wait()


def _nap(processes: Sequence[subprocess.Popen], seconds: float = 0.2) -> float:
    """Sleep, but no longer than until the first that runs has ended."""
    running = next(process for process in processes if process.poll() is None)
    try:
        running.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return seconds
    return 0.0
