"""What is wrong with which node, judged from what all of them reported about themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Report = Mapping[str, Any]
"""What `node_check` writes: node, problems, versions, devices, device_gib, time."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a node. kind: which check found it, a key of the remedies of the preflight."""

    kind: str
    text: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """When nodes were asked, by the clock of the one who asked (seconds since the epoch), and how far off theirs may
    be."""

    began: float
    ended: float
    max_skew_s: float


def problems_of(reports: Mapping[str, Report | None], asked: Asked | None = None) -> dict[str, list[Problem]]:
    """Node -> what is wrong with it (empty: fit). A node without a report did not answer."""
    found: dict[str, list[Problem]] = {}
    answered = {node: report for node, report in reports.items() if report}
    usual = _usual_versions(answered)
    for node, report in reports.items():
        if not report:
            found[node] = [Problem("answer", "it did not answer")]
            continue
        found[node] = [Problem(**problem) for problem in report["problems"]]
        found[node] += _version_problems(report["versions"], usual)
        found[node] += _clock_problems(report["time"], asked) if asked else []
    return found


def bad_nodes(reports: Mapping[str, Report | None], asked: Asked | None = None) -> dict[str, str]:
    """Node -> why it is not fit, in one line; fit ones are left out."""
    found = problems_of(reports, asked)
    return {node: "; ".join(problem.text for problem in problems) for node, problems in found.items() if problems}


def _usual_versions(reports: Mapping[str, Report]) -> dict[str, tuple[str | None, str]]:
    """Name -> (the version that most nodes have, or the first node where none has most; where that is)."""
    usual = {}
    for name in _names(list(reports.values())):
        counts = Counter(report["versions"].get(name) for report in reports.values())
        version, count = counts.most_common(1)[0]  # of equals the one that was met first
        first = next(node for node, report in reports.items() if report["versions"].get(name) == version)
        usual[name] = (version, "most nodes" if 2 * count > len(reports) else first)
    return usual


def _names(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(name for report in reports for name in report["versions"]))


def _version_problems(own: Mapping[str, str | None], usual: Mapping[str, tuple[str | None, str]]) -> list[Problem]:
    return [
        Problem("versions", f"{name} {own.get(name)}, on {where} {version}")
        for name, (version, where) in usual.items()
        if own.get(name) != version
    ]


def _clock_problems(time: float, asked: Asked) -> list[Problem]:
    """A node says its time somewhere between question and answer, so this is the least by which it is off."""
    behind, ahead = asked.began - time, time - asked.ended
    off = max(behind, ahead)
    if off <= asked.max_skew_s:
        return []
    way = "behind" if behind > ahead else "ahead"
    return [Problem("clock", f"its clock is at least {off:.1f} s {way}, {asked.max_skew_s:g} are allowed")]
