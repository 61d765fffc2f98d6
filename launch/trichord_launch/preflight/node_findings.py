"""What nodes said of themselves and of each other, as findings."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trichord_launch.job import NodeCheck
from trichord_launch.node_problems import Asked, Report, problems_of
from trichord_launch.preflight.finding import Finding

_LEAVE_OUT = "or leave {nodes} out: `sbatch: [--exclude={nodes}]` under slurm: in the cluster file"
REMEDIES = {
    "answer": f"`scontrol show node {{nodes}}` says why (drained, down, python not found there?), {_LEAVE_OUT}",
    "devices": f"`nvidia-smi -L` on {{nodes}}; reset or drain it, {_LEAVE_OUT}",
    "device memory": "correct `gpu:` in the cluster file, ask for the right nodes (slurm.sbatch: [--constraint=...]), "
    "or plan for smaller ones",
    "disk": "free space there, set TMPDIR in the cluster file's env: to a larger disk, or lower "
    "node_check.min_disk_free_gib",
    "shm": "remove what was left in /dev/shm of {nodes}, or lower node_check.min_shm_free_gib",
    "run folder": "choose a run.root that is shared and may be written from the nodes",
    "shared folder": "choose a run.root on a file system that all nodes mount under the same path",
    "see": "copy it to a file system that all nodes mount under the same path, or mount it there (container mounts)",
    "versions": "install the same on {nodes}: one environment on a shared file system, or one container image",
    "clock": "synchronise the clock of {nodes} (chrony, ntpd), or raise node_check.max_clock_skew_s",
    "port": "end what listens there: `ss -tlnp` on {nodes}",
    "command": f"see what it says there, {_LEAVE_OUT}",
}
_SLOW = 0.5  # of the median pair, or of what the cluster file promises
_NAMED = 4


def node_findings(reports: Mapping[str, Report | None], asked: Asked, check: NodeCheck, gpus: int) -> list[Finding]:
    """One finding for each kind of problem, with the nodes that have it; what all nodes passed is one line.

    gpus: that each node was to have.
    """
    problems = problems_of(reports, asked)
    kinds = Counter(problem.kind for found in problems.values() for problem in found)
    findings = []
    for kind in (kind for kind in REMEDIES if kind in kinds):
        texts = {
            node: "; ".join(problem.text for problem in found if problem.kind == kind)
            for node, found in problems.items()
            if any(problem.kind == kind for problem in found)
        }
        detail = "; ".join(f"{node}: {text}" for node, text in texts.items())
        findings.append(Finding(f"nodes: {kind}", "fail", detail, REMEDIES[kind].format(nodes=",".join(texts))))
    fit = [node for node, found in problems.items() if not found]
    if fit:
        devices = f"{gpus} GPUs each" if gpus else "no GPUs asked for"
        said = f"{', '.join(fit)}: {devices}; space, versions, clock, run folder, {len(check.see)} paths of the run"
        findings.insert(0, Finding("nodes", "pass", said))
    return findings


def links_findings(
    links: Mapping[str, Any], check: NodeCheck, gpus: int, network_gb_per_s: float | None = None
) -> list[Finding]:
    """All-reduce, pairs and clocks as `trichord.benchmarks.links` wrote them. gpus: that each node was to have."""
    ranks, reduced = links["ranks"], links["all_reduce"]
    nodes = list(dict.fromkeys(rank["node"] for rank in ranks))
    there = f"{len(nodes)} nodes" if len(nodes) > 1 else nodes[0]
    said = f"{len(ranks)} ranks on {there} over {links['backend']}, {reduced['gb_per_s']:.3g} GB/s"
    if not reduced["right"]:
        remedy = "memory or network of a node is at fault: run its vendor's diagnostics (dcgmi diag -r 3)"
        return [Finding("all-reduce", "fail", f"{said}: the sum is wrong", remedy)]
    findings = [Finding("all-reduce", "pass", said)]
    blind = list(dict.fromkeys(rank["node"] for rank in ranks if rank["cuda_devices"] < gpus))
    if blind:
        remedy = "install a torch built for the GPUs and their driver (python -c 'import torch; torch.cuda.init()')"
        findings.append(
            Finding("torch devices", "fail", f"{', '.join(blind)}: torch sees fewer than {gpus} GPUs", remedy)
        )
    if links["pairs"]:
        findings.append(_pairs(links["pairs"], network_gb_per_s if links["backend"] == "nccl" else None))
        findings.append(_clocks(links["clock_ahead_s"], check.max_clock_skew_s))
    return findings


def links_failed(why: str, log: str) -> Finding:
    """The ranks could not all reach each other."""
    remedy = (
        "set network_interface in the cluster file (`ip -br addr` on a node lists them), open ports between the nodes, "
        "and see the log"
    )
    return Finding("all-reduce", "fail", f"{why}; log: {log}", remedy)


def _pairs(pairs: list[dict[str, Any]], promised: float | None) -> Finding:
    rates = {" - ".join(pair["nodes"]): pair["gb_per_s"] for pair in pairs}
    usual = statistics.median(rates.values())
    bar = max(_SLOW * usual, _SLOW * (promised or 0.0))
    slow = {pair: rate for pair, rate in sorted(rates.items(), key=lambda item: item[1]) if rate < bar}
    told = ", ".join(f"{pair} {rate:.3g}" for pair, rate in list((slow or rates).items())[:_NAMED])
    if not slow:
        return Finding("pairs of nodes", "pass", f"{len(rates)}, median {usual:.3g} GB/s each way ({told})")
    often = Counter(node for pair in slow for node in pair.split(" - ")).most_common(1)[0][0]
    said = f"{len(slow)} of {len(rates)} slower than {bar:.3g} GB/s: {told}; median {usual:.3g}"
    remedy = f"look at the cards and cables of {often}, at NCCL_IB_HCA and network_interface in the cluster file"
    return Finding("pairs of nodes", "warn", said, remedy)


def _clocks(ahead: Mapping[str, float], limit: float) -> Finding:
    node, most = max(ahead.items(), key=lambda item: abs(item[1]))
    said = f"{node} is {most:+.3g} s from {next(iter(ahead))}, the most of all; {limit:g} s are allowed"
    if abs(most) <= limit:
        return Finding("clocks", "pass", said)
    return Finding("clocks", "fail", said, REMEDIES["clock"].format(nodes=node))
