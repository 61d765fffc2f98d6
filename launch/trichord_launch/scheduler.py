"""Slurm as the launcher uses it: scontrol, squeue, sbatch, scancel. Never sacct, which many clusters do not have."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trichord.core.errors import ConfigError, TrichordError

_TIMEOUT_S = 60.0
_QUEUE_FORMAT = "%i|%T|%r|%N|%M|%L|%S|%A"


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue. job_id: as users write it (`7`, `7_2`); raw_id: as scontrol takes it."""

    job_id: str
    state: str
    reason: str
    nodes: str
    elapsed: str
    time_left: str
    start: str
    raw_id: str


class SchedulerError(TrichordError):
    """A command of Slurm failed."""


def run(*argv: str, tries: int = 1, timeout_s: float = _TIMEOUT_S) -> str:
    """Output of a Slurm command.

    Raises:
        ConfigError: there is no such program here.
        SchedulerError: it failed, `tries` times; holds what it said.
    """
    if shutil.which(argv[0]) is None:
        raise ConfigError(f"{argv[0]} is not on this machine; run this where Slurm's commands are (a login node)")
    said = ""
    for number in range(tries):
        if number:
            time.sleep(min(5.0, 0.5 * 2**number))
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            said = f"no answer within {timeout_s:.0f} s"
            continue
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.strip() or f"exit code {done.returncode}"  # below 0: a signal to the whole job met it
    raise SchedulerError(f"`{' '.join(argv)}` failed: {said}")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """sbatch; returns the job id.

    Raises:
        ConfigError: Slurm refuses the job, in its words.
    """
    try:
        return run("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]
    except SchedulerError as error:
        raise ConfigError(f"Slurm does not take the job: {error}") from error


def job_facts(job_id: str, tries: int = 3) -> dict[str, str]:
    """`scontrol show job`, parsed; empty where the controller knows no such job (any more), or does not answer."""
    try:
        return parse_job(job_text(job_id, tries))
    except SchedulerError:
        return {}


def job_text(job_id: str, tries: int = 3) -> str:
    """`scontrol show job`, as it is."""
    return run("scontrol", "-o", "show", "job", job_id, tries=tries)


def parse_job(text: str) -> dict[str, str]:
    """`Name=value` pairs of the first line; `(null)` and `N/A` are left out."""
    pairs = re.findall(r"(?:^|\s)([A-Z][\w/:&]*)=(\S*)", text.split("\n", 1)[0])
    return {name: value for name, value in pairs if value not in ("(null)", "N/A", "None", "Unknown", "")}


def end_time(facts: dict[str, str]) -> float | None:
    """When the time limit ends a running job, in seconds since the epoch; None: never, or not known."""
    try:
        return time.mktime(time.strptime(facts["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    except (KeyError, ValueError):
        return None


def queue(job_ids: Iterable[str]) -> list[QueuedJob]:
    """Those of the jobs that squeue still lists. Raises SchedulerError where Slurm does not answer."""
    wanted = [job_id for job_id in job_ids if job_id]
    if not wanted:
        return []
    try:
        text = run("squeue", "--noheader", f"--format={_QUEUE_FORMAT}", f"--jobs={','.join(wanted)}")
    except SchedulerError as error:
        if "Invalid job id" in str(error):  # what squeue says of one job that is long gone
            return []
        raise
    rows = [line.split("|") for line in text.splitlines()]
    return [QueuedJob(*row) for row in rows if len(row) == len(QueuedJob.__annotations__)]


def host_names(node_list: str) -> list[str]:
    """`n[1-3]` -> n1, n2, n3."""
    return run("scontrol", "show", "hostnames", node_list, tries=3).split() if node_list else []


def signal_steps(job_id: str, name: str) -> None:
    """Send a signal to all steps of a job, not to its batch process. That there is none any more is no error."""
    try:
        run("scancel", f"--signal={name}", job_id, tries=2)
    except SchedulerError as error:
        if "already completing" not in str(error) and "Invalid job id" not in str(error):
            raise


def kill_steps(job_id: str) -> None:
    """End all steps of a job at once, and not the job: `scancel --signal=KILL` with a job's id would cancel that."""
    listed = run("squeue", "--steps", "--noheader", f"--jobs={job_id}", "--format=%i", tries=2).split()
    steps = [step for step in listed if step.rpartition(".")[2].isdigit()]  # not .batch, .extern
    if steps:
        run("scancel", *steps, tries=2)


def requeue(job_id: str, exclude: Sequence[str] = ()) -> None:
    """Put a running job back into the queue, for other nodes than `exclude`.

    Nodes can be excluded of waiting jobs only, so it is done in this order, in the seconds until this process is
    killed. Raises SchedulerError.
    """
    run("scontrol", "requeue", job_id, tries=3)
    if exclude:
        exclude_nodes(job_id, exclude)


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> None:
    """Have a waiting job start on other nodes than these. Raises SchedulerError."""
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}", tries=4)


def cancel(job_ids: Sequence[str]) -> None:
    """scancel. Raises SchedulerError."""
    if job_ids:
        run("scancel", *job_ids, tries=2)
