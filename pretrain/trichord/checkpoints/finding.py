"""What a check of a checkpoint found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trichord.checkpoints.manifest import incomplete_reason, step_folders
from trichord.core import words

Verdict = Literal["pass", "warn", "fail", "skip"]
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """The result of one check: `detail` is what was found, `remedy` what to do about it."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def earlier(folder: Path) -> str:
    """What to do about a damaged checkpoint: what else is there."""
    beside = step_folders(folder.parent).values()
    others = [path.name for path in beside if path.name != folder.name and incomplete_reason(path) is None]
    there = f"go on from {others[-1]} (remove or move this folder)" if others else "there is no other one beside it"
    return f"copy a whole one back, or {there}"


def some(names: list[str]) -> str:
    """The first of them, and how many more."""
    return words.some(names, _NAMED)
