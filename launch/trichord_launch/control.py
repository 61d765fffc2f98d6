"""`trichord-launch cancel` and `attach`, and where the jobs of a run stand in Slurm's queue."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.status import write_atomically
from trichord_launch import scheduler
from trichord_launch.batch import CANCEL_FILE, LINKS_FILE
from trichord_launch.record import attempt_numbers, read_json
from trichord_launch.scheduler import QueuedJob
from trichord_launch.supervise import LOCK_FILE, is_held


def submissions(folder: Path) -> list[Path]:
    """Those of a run that reached Slurm, the newest first."""
    found = [path.parent for path in folder.glob(f"submissions/*/{LINKS_FILE}")]
    return sorted(found, key=lambda path: _links(path)[0], reverse=True)


def job_ids(folder: Path) -> list[str]:
    """All jobs this run was ever submitted as, those of the newest submission first."""
    return [job_id for path in submissions(folder) for job_id in _links(path)[1]]


def _links(submission: Path) -> tuple[float, list[str]]:
    """(when it was submitted, the ids of its jobs).

    Raises:
        TrichordError: somebody broke the file.
    """
    facts = read_json(submission / LINKS_FILE)
    time, job_ids = facts.get("time"), facts.get("job_ids")
    if not isinstance(time, int | float) or not isinstance(job_ids, list):
        raise TrichordError(
            f"{submission / LINKS_FILE} does not say which jobs were submitted; `squeue --me` lists those in the "
            "queue, and without the file they are not known to belong to this run"
        )
    return time, [str(job_id) for job_id in job_ids]


def queued_jobs(folder: Path) -> list[QueuedJob]:
    """Those of the run's jobs that are waiting or running; empty where there is no Slurm here.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    return scheduler.queue(job_ids(folder)) if shutil.which("squeue") else []


def require_free(folder: Path) -> None:
    """Refuse to submit a run that is in the queue already: two jobs would train it at once.

    Raises:
        ConfigError: naming the job.
    """
    for job in queued_jobs(folder):
        raise ConfigError(
            f"run {folder.name} is in the queue already, as job {job.job_id} ({job.state.lower()}); "
            f"`trichord-launch cancel {folder}` ends it, or give this run another run.name"
        )


def cancel(folder: Path, now: bool = False) -> str:
    """Have a run save and stop for good; with `now` end it at once. Returns what was done.

    Raises:
        ConfigError: nothing of it is waiting or running.
    """
    jobs = queued_jobs(folder)
    if not jobs:
        return _cancel_here(folder, now)
    for path in submissions(folder):
        if set(_links(path)[1]) & {job.job_id for job in jobs}:
            write_atomically(path / CANCEL_FILE, "")  # the batch process looks for it
    # Slurm itself ends a job that is not running yet, or is just being put back.
    running = [job for job in jobs if job.state == "RUNNING" and not now]
    scheduler.cancel([job.job_id for job in jobs if job not in running])
    for job in running:
        scheduler.run("scancel", "--batch", "--signal=USR1", job.job_id, tries=2)
    ended = [f"job {job.job_id} taken out of the queue" for job in jobs if job not in running]
    asked = [f"job {job.job_id} asked to save and stop; `trichord-launch status` tells when" for job in running]
    return "\n".join([*asked, *ended])


def attach_command(folder: Path, rank: int, command: Sequence[str] = ()) -> list[str]:
    """A shell, or `command`, on the node of a rank, within the running job.

    Raises:
        ConfigError: no job of the run is running, or there is no such rank.
    """
    running = [job for job in queued_jobs(folder) if job.state == "RUNNING"]
    if not running:
        raise ConfigError(
            f"no job of run {folder.name} is running; `trichord-launch status {folder}` says what it does"
        )
    numbers = attempt_numbers(folder)
    record = folder / "attempts" / str(numbers[-1] if numbers else 1) / "command.json"
    facts = read_json(record)
    nodes, per_node = facts.get("nodes"), facts.get("ranks_per_node")
    if not isinstance(nodes, list) or not isinstance(per_node, int):
        raise ConfigError(
            f"{record} does not say on which nodes the ranks are, or is not there yet; `squeue` says where job "
            f"{running[0].job_id} runs, and `srun --jobid={running[0].raw_id} --overlap --pty bash -l` goes there"
        )
    if not 0 <= rank < len(nodes) * per_node:
        raise ConfigError(f"--rank must be 0 to {len(nodes) * per_node - 1}, got {rank}")
    where = ["--nodes=1", "--ntasks=1", f"--nodelist={nodes[rank // per_node]}"]
    return ["srun", f"--jobid={running[0].raw_id}", "--overlap", *where, *(command or ("--pty", "bash", "-l"))]


def _cancel_here(folder: Path, now: bool) -> str:
    """The same for a run that a launcher on this machine holds."""
    held = re.match(r"process (\d+) on (\S+)", _text(folder / LOCK_FILE)) if is_held(folder) else None
    if held is None:
        raise ConfigError(f"nothing of run {folder.name} is waiting or running; `trichord-launch status` says more")
    pid, host = int(held[1]), held[2]
    if host != socket.gethostname():
        raise ConfigError(f"run {folder.name} is held by a launcher on {host}; cancel it there")
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(2 if now else 0):  # Ctrl-C twice, as it were; two at one moment would count as one
            time.sleep(0.3)
            os.kill(pid, signal.SIGINT)
    except OSError as error:
        raise TrichordError(f"process {pid} cannot be signalled: {error.strerror}") from error
    return f"process {pid} {'told to end at once' if now else 'asked to save and stop'}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
