"""`python -m trichord_launch.preflight.allocation JOB.json`: the batch process of the job that looks at nodes.

On the first node: is the port free, is each node fit, then one step with all ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from trichord.core.errors import TrichordError
from trichord_launch import scheduler
from trichord_launch.job import SlurmJob, read_job
from trichord_launch.nodes import ask_nodes
from trichord_launch.ports import free_port
from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.node_findings import links_findings, node_findings
from trichord_launch.preflight.port import check_port
from trichord_launch.preflight.slurm_nodes import write_result
from trichord_launch.preflight.this_node import run_links
from trichord_launch.steps import Start, port_of, train_step


def main() -> int:
    """Write what was found into the job's folder."""
    try:
        job = read_job(Path(sys.argv[1]))
        write_result(job.folder, *look(job))
    except TrichordError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def look(job: SlurmJob) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, what the ranks measured)."""
    nodes = scheduler.host_names(os.environ["SLURM_JOB_NODELIST"])
    findings = [check_port(None, os.environ)]
    gpus = job.ranks_per_node if job.gpus else 0
    reports, asked = ask_nodes(job, nodes, job.folder / "node_check")
    found = node_findings(reports, asked, job.check, gpus)
    findings += found
    if any(finding.verdict == "fail" for finding in found):
        return [*findings, Finding("all-reduce", "skip", "not before every node is fit")], {}
    links = _ask_ranks(job)
    if isinstance(links, Finding):
        return [*findings, links], {}
    return [*findings, *links_findings(links, job.check, gpus, job.network_gb_per_s)], links


def _ask_ranks(job: SlurmJob) -> dict[str, Any] | Finding:
    job_id = os.environ["SLURM_JOB_ID"]
    start = Start(job_id, 0, 0, os.environ["SLURMD_NODENAME"], free_port(port_of(job_id, 0)))
    command = train_step(job, start)
    (job.folder / "attempts" / "0").mkdir(parents=True, exist_ok=True)
    return run_links(command.argv, {**os.environ, **command.environment}, job.folder)


if __name__ == "__main__":
    sys.exit(main())
