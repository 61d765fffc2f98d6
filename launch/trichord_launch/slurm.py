"""`trichord-launch slurm`: a config, a cluster and a number of nodes -> a batch script, shown or submitted."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trichord.config.cluster import TIME_FORMS, TIME_PATTERN, ClusterConfig
from trichord.config.identity import inspect_run_folder, run_path
from trichord.config.load import load_cluster, load_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord_launch import scheduler
from trichord_launch.batch import LINKS_FILE
from trichord_launch.command import TRAIN_ENTRY, stop_timeout_s
from trichord_launch.control import require_free
from trichord_launch.grid import Cell, expand_grid
from trichord_launch.job import NODE_RUNNER, RANK_RUNNER, Budget, NodeCheck, SlurmJob
from trichord_launch.job_size import require_groups, size_warnings
from trichord_launch.script import Script, render_script
from trichord_launch.snapshot import write_snapshot


@dataclass(frozen=True)
class Request:
    """What the user asks for. time: None: the cluster's limit. links: jobs of a chain, where requeue is forbidden.

    at_once: jobs of a grid that may run at a time. entry, runner: what ranks and nodes run; tests put in their own.
    """

    config: str
    cluster: str
    nodes: int = 1
    time: str | None = None
    overrides: Sequence[str] = ()
    grid: Sequence[str] = ()
    at_once: int | None = None
    links: int | None = None
    launcher: str = "torchrun"
    budget: Budget = field(default_factory=Budget)
    entry: tuple[str, ...] = TRAIN_ENTRY
    runner: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Submission:
    """Everything that is to be submitted, checked and rendered; nothing is written yet.

    runs: config and job of each run; more than one: a grid, whose script lies with the name that they derive from.
    """

    folder: Path
    script: str
    runs: list[tuple[RunConfig, SlurmJob]]
    links: int
    grid: bool


def prepare(request: Request, now: float | None = None) -> Submission:
    """Check all that can be checked here, and render.

    Raises:
        ConfigError: the config, the cluster or an option is wrong.
        CheckpointError: a config does not fit the run that stands in its folder.
    """
    cluster = load_cluster(request.cluster)
    _check_request(request, cluster)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    base = load_run_config(request.config, request.overrides)
    folder = _new_folder(run_path(base).absolute() / "submissions", stamp)
    cells = expand_grid(request.grid)
    runs = [_run_of(request, cluster, base, cell, folder) for cell in cells]
    script = Script(
        run_name=base.run.name,
        folder=folder,
        cwd=Path.cwd(),
        cluster=cluster,
        nodes=request.nodes,
        time=request.time or (cluster.slurm.time_limit if cluster.slurm else ""),
        python=batch_python(cluster),
        cells=len(runs) if request.grid else 0,
        at_once=request.at_once,
    )
    return Submission(folder, render_script(script), runs, _links(request, cluster), bool(request.grid))


def submit(submission: Submission) -> list[str]:
    """Write the submission into the run folders and hand it to Slurm; returns the job ids, several for a chain.

    Raises:
        ConfigError: a folder cannot be written, or Slurm refuses.
    """
    for _, job in submission.runs:
        require_free(job.folder)
    try:
        script = write_atomically(submission.folder / "job.sh", submission.script)
        for number, (config, job) in enumerate(submission.runs):
            write_snapshot(Path(job.submission), config)
            write_atomically(Path(job.submission) / "job.json", job.to_json())
            if submission.grid:
                write_atomically(submission.folder / "cells" / f"{number}.json", job.to_json())
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}; choose another run.root") from error
    job_ids: list[str] = []
    try:
        for _ in range(submission.links):
            after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
            job_ids.append(scheduler.submit(script, after))
    except ConfigError:
        if not job_ids:  # nothing was submitted: nothing is left of it
            _remove(submission)
        raise
    finally:
        for number, (_, job) in enumerate(submission.runs if job_ids else []):
            own = [f"{job_id}_{number}" for job_id in job_ids] if submission.grid else job_ids
            links = json.dumps({"job_ids": own, "time": time.time()}) + "\n"
            write_atomically(Path(job.submission) / LINKS_FILE, links)
    return job_ids


def _remove(submission: Submission) -> None:
    for folder in {submission.folder, *(Path(job.submission) for _, job in submission.runs)}:
        shutil.rmtree(folder, ignore_errors=True)


def describe(submission: Submission, submitted: bool) -> str:
    """What is said beside the script or the job ids."""
    runs = [job for _, job in submission.runs]
    first = runs[0]
    ranks = f"{first.nodes} x {first.ranks_per_node} = {first.ranks} ranks"
    lines = [f"{len(runs)} runs of {ranks} in one array:"] if submission.grid else [f"1 run of {ranks}:"]
    lines += [f"  {job.run_name:<24} {job.run_folder}" for job in runs]
    if submission.links > 1:
        lines.append(f"a chain of {submission.links} jobs")
    for config, job in submission.runs:
        lines += [f"warning: {said}" for said in size_warnings(config, job.ranks, job.ranks_per_node)]
    if submitted:
        return "\n".join([*lines, f"follow it with: trichord-launch status {first.run_folder}"])
    return "\n".join([*lines, "only shown; submit it with --submit"])


def _run_of(
    request: Request, cluster: ClusterConfig, base: RunConfig, cell: Cell, folder: Path
) -> tuple[RunConfig, SlurmJob]:
    """Config and job of one run."""
    config = base
    if cell.suffix:
        group = base.tracking.wandb.group or f"{base.run.name}-{folder.name}"
        added = [*cell.overrides, f"run.name={base.run.name}{cell.suffix}", f"tracking.wandb.group={group}"]
        config = load_run_config(request.config, [*request.overrides, *added])
    inspect_run_folder(config)
    require_groups(config, request.nodes * cluster.gpus_per_node)
    place = run_path(config).absolute()
    return config, slurm_job(request, cluster, config, place, place / "submissions" / folder.name)


def slurm_job(request: Request, cluster: ClusterConfig, config: RunConfig, place: Path, submission: Path) -> SlurmJob:
    """The job of one run. place: its folder; submission: folder of what is submitted, where its config lies."""
    slurm = cluster.slurm
    assert slurm is not None  # _check_request
    container = slurm.container
    options = list(slurm.srun)
    if container is not None:
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        options += [f"--container-image={container.image}", *mounts, *container.options]
    job = SlurmJob(
        run_name=config.run.name,
        run_folder=str(place),
        submission=str(submission),
        config=str(submission / "config.yaml"),
        resume=config.run.resume,
        nodes=request.nodes,
        ranks_per_node=cluster.gpus_per_node,
        cores=slurm.cpus_per_task,
        gpus=cluster.env.get("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR")) != "cpu",
        python=container.python if container else batch_python(cluster),
        entry=request.entry,
        srun=tuple(options),
        prefix=slurm.task_prefix,
        requeue=slurm.requeue,
        stop_timeout_s=stop_timeout_s(config),
        budget=request.budget,
        check=NodeCheck(**cluster.node_check.model_dump()),
        network_gb_per_s=cluster.node_network_gb_per_s,
    )
    if request.launcher == "srun":
        job = replace(job, launcher="srun", runner=RANK_RUNNER)
    return replace(job, runner=request.runner or (RANK_RUNNER if request.launcher == "srun" else NODE_RUNNER))


def batch_python(cluster: ClusterConfig) -> str:
    """The interpreter of the batch process, which stays outside a container."""
    return cluster.python or sys.executable


def _check_request(request: Request, cluster: ClusterConfig) -> None:
    if cluster.slurm is None:
        raise ConfigError(f"cluster {cluster.name} has no slurm: section, so jobs cannot be submitted to it; add one")
    if not 1 <= request.nodes <= cluster.nodes:
        raise ConfigError(
            f"--nodes must be 1 to {cluster.nodes}, which cluster {cluster.name} has; got {request.nodes}"
        )
    if request.time is not None and not re.fullmatch(TIME_PATTERN, request.time):
        raise ConfigError(f"--time: expected {TIME_FORMS}, got {request.time!r}")
    if request.launcher not in ("torchrun", "srun"):
        raise ConfigError(f"--launcher: expected torchrun or srun, got {request.launcher!r}")
    if request.links is not None and cluster.slurm.requeue:
        raise ConfigError(
            f"--links is for clusters that forbid requeue; a job on {cluster.name} requeues itself (slurm.requeue)"
        )
    if request.grid and not cluster.slurm.requeue and (request.links or 1) > 1:
        raise ConfigError("--grid cannot be a chain; submit the runs one by one, or leave --links out")


def _links(request: Request, cluster: ClusterConfig) -> int:
    return 1 if cluster.slurm is None or cluster.slurm.requeue else request.links or 1


def _new_folder(parent: Path, stamp: str) -> Path:
    """A name that no other submission has."""
    folder, number = parent / stamp, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stamp}-{number}"
    return folder
