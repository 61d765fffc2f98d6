"""This machine as the only node: the node check, then as many ranks as asked for, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trichord_launch.command import LocalJob, render
from trichord_launch.job import NodeCheck
from trichord_launch.machine import require_fit, this_machine
from trichord_launch.node_problems import Asked
from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.node_findings import links_failed, links_findings, node_findings
from trichord_launch.preflight.request import LINKS_ENTRY, Loaded
from trichord_launch.record import read_json
from trichord_launch.steps import check_words

LINKS_TIMEOUT_S = 180.0


def ask_this_machine(
    loaded: Loaded, record: Path, check: NodeCheck, say: Callable[[str], None]
) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, what the ranks measured). record: folder for what is said. Raises ConfigError: too many ranks."""
    machine, procs = this_machine(), loaded.request.procs or 1
    require_fit(procs, machine)
    gpus, folder = procs if machine.gpus else 0, record / "node_check"
    began = time.time()
    words = check_words(check, folder, str(record), gpus)
    with open(record / "node_check.log", "wb") as log:
        command = [sys.executable, *words]
        subprocess.run(command, stdout=log, stderr=log, timeout=check.timeout_s, check=False)
    reports = {path.stem: read_json(path) for path in folder.glob("*.json")} or {"this machine": None}
    findings = node_findings(reports, Asked(began, time.time(), check.max_clock_skew_s), check, gpus)
    if any(finding.verdict == "fail" for finding in findings):
        return [*findings, Finding("all-reduce", "skip", "not before the node is fit")], {}
    say(f"starting {procs} ranks")
    job = LocalJob(record, loaded.config.run.name, str(record / "links.json"), (), procs, attempt=0)
    command = render(job, machine, os.environ, entry=LINKS_ENTRY)
    links = run_links(command.argv, {**os.environ, **command.environment}, record)
    if isinstance(links, Finding):
        return [*findings, links], {}
    return [*findings, *links_findings(links, check, gpus)], links


def run_links(argv: tuple[str, ...], environ: dict[str, str], record: Path) -> dict[str, Any] | Finding:
    """Start the ranks and wait for what they measured; a finding where that did not come."""
    path = record / "links.log"
    with open(path, "wb") as log:
        process = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=LINKS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return links_failed(f"ranks had not reached each other after {LINKS_TIMEOUT_S:.0f} s", str(path))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    links = read_json(record / "links.json")
    return links or links_failed(f"ranks ended with code {code}", str(path))
