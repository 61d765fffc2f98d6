"""Host memory of this process and of those that it started. No torch."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


def resident_bytes() -> tuple[int, int]:
    """Resident bytes of this process, and of all processes below it together (data workers); zeros without /proc.

    Pages that processes share, as after a fork, count in each of them.
    """
    own = os.getpid()
    return _resident(own), sum(_resident(pid) for pid in _below(own))


def _resident(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):  # it has ended, or there is no /proc
        return 0


def _below(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for task in _listed(_PROC / str(waiting.pop()) / "task"):
            try:
                children = [int(child) for child in (task / "children").read_text().split()]
            except (OSError, ValueError):
                continue
            found += children
            waiting += children
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
