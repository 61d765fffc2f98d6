"""What one check found, and the exit code that follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trichord.core.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_DONE, TrichordError
from trichord_launch.machine import EXIT_MACHINE

Verdict = Literal["pass", "warn", "fail", "skip"]
Kind = Literal["config", "data", "checkpoint", "machine"]

_CODES: dict[Kind, int] = {
    "config": EXIT_CONFIG,
    "data": EXIT_DATA,
    "checkpoint": EXIT_CHECKPOINT,
    "machine": EXIT_MACHINE,
}


@dataclass(frozen=True)
class Finding:
    """check: what was looked at; detail: what was found; remedy: what to do, always there where the verdict is `fail`.

    kind: what is at fault, which decides the exit code.
    """

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    kind: Kind = "machine"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_error(check: str, error: TrichordError, remedy: str) -> Finding:
    """A failed check from an error that training would die of. remedy: used where its message ends without one.

    Messages say what was expected and what came, and after the last semicolon or on the last line what to do.
    """
    text = str(error)
    cut = max(text.rfind("; "), text.rfind("\n"))
    what, told = text[: max(cut, 0)], text[cut + 1 :].strip()
    kinds: list[Kind] = [kind for kind, code in _CODES.items() if code == error.exit_code]
    kind = kinds[0] if kinds else "machine"
    return Finding(check, "fail", what or text, told if what else remedy, kind)


def exit_code(findings: Iterable[Finding]) -> int:
    """0, or the code of what is at fault: of several the config first, then data, checkpoint, machines."""
    failed = {finding.kind for finding in findings if finding.verdict == "fail"}
    return next((code for kind, code in _CODES.items() if kind in failed), EXIT_DONE)
