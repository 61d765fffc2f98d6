"""`trichord-launch preflight`: first this machine, then, if asked for, the nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trichord.core.errors import TrichordError
from trichord.core.status import write_atomically
from trichord_launch.preflight.finding import Finding, of_error
from trichord_launch.preflight.login import check_login_node
from trichord_launch.preflight.plan_findings import usable_plan
from trichord_launch.preflight.report import as_json
from trichord_launch.preflight.request import Loaded, Request, load, new_record, node_check
from trichord_launch.preflight.shards import SourceFacts
from trichord_launch.preflight.slurm_nodes import ask_slurm, render
from trichord_launch.preflight.this_node import ask_this_machine


@dataclass
class Result:
    """findings, in order; links: what ranks measured between nodes, as written by `trichord.benchmarks.links`."""

    findings: list[Finding]
    links: dict[str, Any] = field(default_factory=dict)


def preflight(request: Request, say: Callable[[str], None]) -> Result:
    """Everything that was asked for. say: told what is being waited for."""
    try:
        loaded = load(request)
    except TrichordError as error:
        return Result([of_error("config", error, "correct it, then: trichord config check CONFIG")])
    findings, sources = check_login_node(loaded)
    result = Result(findings)
    if request.wants_nodes or request.procs is not None:
        _look_at_nodes(loaded, sources, result, say)
    return result


def show(request: Request) -> str:
    """What would be submitted to look at nodes; writes nothing. Raises ConfigError."""
    return render(load(request))


def _look_at_nodes(loaded: Loaded, sources: list[SourceFacts], result: Result, say: Callable[[str], None]) -> None:
    if any(finding.verdict == "fail" and finding.check == "run folder" for finding in result.findings):
        result.findings.append(Finding("nodes", "skip", "there is no folder to write what they say into"))
        return
    record = new_record(loaded.config)
    plan = usable_plan(loaded)
    check = node_check(loaded, record, sources, plan.device_bytes if plan is not None else None)
    ask = ask_slurm if loaded.request.wants_nodes else ask_this_machine
    try:
        found, result.links = ask(loaded, record, check, say)
        result.findings += found
    except TrichordError as error:
        result.findings.append(of_error("nodes", error, "see what Slurm says"))
    write_atomically(record / "report.json", as_json(result.findings, {"links": result.links}) + "\n")
