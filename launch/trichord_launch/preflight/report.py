"""A preflight for a person, as a table, and for scripts, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trichord_launch.preflight.finding import Finding, exit_code

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def as_json(findings: Sequence[Finding], more: Mapping[str, Any] | None = None) -> str:
    """format, exit_code, findings; and what was measured on nodes."""
    facts = {"format": 1, "exit_code": exit_code(findings), "findings": [finding.to_json() for finding in findings]}
    return json.dumps({**facts, **(more or {})}, indent=2)


def print_table(findings: Sequence[Finding]) -> None:
    """One row for each finding, remedies under what failed; then the verdict in one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("check")
    table.add_column("what was found", overflow="fold")
    for finding in findings:
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n-> {finding.remedy}", style="bold" if finding.verdict == "fail" else "")
        table.add_row(Text(finding.verdict, style=_COLOURS[finding.verdict]), Text(finding.check), detail)
    console.print(table)
    console.print(summary(findings), highlight=False)


def summary(findings: Sequence[Finding]) -> str:
    """The verdict in one line."""
    failed = sum(finding.verdict == "fail" for finding in findings)
    warned = sum(finding.verdict == "warn" for finding in findings)
    said = f"{failed} failed, {warned} to look at, {len(findings)} checks"
    return f"ready: {said}" if not failed else f"NOT ready: {said}; exit code {exit_code(findings)}"
