"""Nodes of a Slurm cluster, looked at by a short job that has the same script as the run's own: modules, variables,
container and all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trichord.config.cluster import ClusterConfig
from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord_launch import scheduler
from trichord_launch import slurm as target
from trichord_launch.job import NodeCheck, SlurmJob
from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.request import LINKS_ENTRY, Loaded
from trichord_launch.record import read_json
from trichord_launch.script import Script, render_script

RESULT_FILE = "nodes.json"
BATCH = "trichord_launch.preflight.allocation"
_POLL_S = 0.5
_TOLD_EVERY_S = 10.0
_GRACE_S = 10.0  # a shared file system shows what a job has written some seconds later


def ask_slurm(
    loaded: Loaded, record: Path, check: NodeCheck, say: Callable[[str], None]
) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, what the ranks measured), after waiting for the job to start and to end. Ctrl-C cancels it.

    Raises:
        ConfigError: Slurm refuses the job. SchedulerError: it does not answer.
    """
    job = _job(loaded, record, check)
    write_atomically(record / "job.json", job.to_json())
    job_id = scheduler.submit(write_atomically(record / "job.sh", _script(loaded, record)))
    say(f"job {job_id} looks at {job.nodes} nodes; what it says lies in {record}")
    try:
        found = _wait(job_id, record, say)
    except BaseException:
        scheduler.cancel([job_id])
        raise
    if not found:
        log = next(iter(record.glob("*.log")), record)
        remedy = "see its log; `scontrol show job` and the cluster file (python, modules, setup) say what it was given"
        return [Finding("nodes", "fail", f"job {job_id} ended without a word; log: {log}", remedy)], {}
    return [Finding(**finding) for finding in found["findings"]], found["links"]


def render(loaded: Loaded) -> str:
    """The batch script, for a folder that is not made."""
    if loaded.cluster is None or loaded.cluster.slurm is None:
        return "nothing is submitted; nodes are looked at with --nodes N --cluster NAME\n"
    return _script(loaded, Path(loaded.config.run.root).absolute() / loaded.config.run.name / "preflight" / "TIME")


def _script(loaded: Loaded, record: Path) -> str:
    cluster, request = _cluster(loaded), loaded.request
    script = Script(
        run_name=f"{loaded.config.run.name}-preflight",
        folder=record,
        cwd=Path.cwd(),
        cluster=cluster,
        nodes=request.node_count,
        time=request.time,
        python=target.batch_python(cluster),
        module=BATCH,
    )
    return render_script(script)


def _cluster(loaded: Loaded) -> ClusterConfig:
    """The cluster as this job needs it: not requeued, on the nodes that were named, told the port."""
    cluster, request = loaded.cluster, loaded.request
    if cluster is None or cluster.slurm is None:
        raise ConfigError("nodes are looked at through Slurm; name a cluster with a slurm: section")
    named = (f"--nodelist={','.join(request.node_list)}",) if request.node_list else ()
    slurm = cluster.slurm.model_copy(update={"requeue": False, "sbatch": (*cluster.slurm.sbatch, *named)})
    env = {**cluster.env, **({"MASTER_PORT": str(request.port)} if request.port is not None else {})}
    return cluster.model_copy(update={"slurm": slurm, "env": env})


def _job(loaded: Loaded, record: Path, check: NodeCheck) -> SlurmJob:
    """The run's own job, with other ranks and its folders under the record."""
    asked = target.Request(loaded.request.config, "", loaded.request.node_count, entry=LINKS_ENTRY)
    job = target.slurm_job(asked, _cluster(loaded), loaded.config, record, record)
    return replace(job, config=str(record / "links.json"), check=check)


def _wait(job_id: str, record: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What the job wrote; empty where it ended without."""
    told, ended = 0.0, None
    while True:
        if found := read_json(record / RESULT_FILE):
            return found
        queued = scheduler.queue([job_id])
        now = time.monotonic()
        if not queued or queued[0].state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            ended = ended or now
            if now - ended > _GRACE_S:
                return {}
        elif now - told > _TOLD_EVERY_S:
            told = now
            reason = f" ({queued[0].reason})" if queued[0].state == "PENDING" else ""
            say(f"job {job_id} is {queued[0].state.lower()}{reason}")
        time.sleep(_POLL_S)


def write_result(record: Path, findings: list[Finding], links: dict[str, Any]) -> None:
    """By the job, for the one who waits."""
    facts = {"findings": [finding.to_json() for finding in findings], "links": links}
    write_atomically(record / RESULT_FILE, json.dumps(facts, indent=2) + "\n")
