"""Ports at which ranks meet: which are free on this machine, and who holds one that is not."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

PORTS = range(20000, 30000)  # below the ports that Linux hands out by itself
_LISTENS = "0A"  # a state in /proc/net/tcp


def is_free(port: int) -> bool:
    """Whether nobody listens there on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("", port))
            return True
    return False


def free_port(first: int) -> int:
    """The first free port from `first` on, within `PORTS`; `first` where none of the next hundred is."""
    ports = (PORTS.start + (first - PORTS.start + offset) % len(PORTS) for offset in range(100))
    return next((port for port in ports if is_free(port)), first)


def holder(port: int) -> str:
    """`, by process 7 (name)` of who listens there, as far as this user may see it; else empty."""
    sockets = {f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening(table, port)}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) in sockets for link in (folder / "fd").iterdir()):
                return f", by process {folder.name} ({(folder / 'comm').read_text().strip()})"
        except OSError:  # it has ended, or is somebody else's
            continue
    return ""


def _listening(table: str, port: int) -> list[str]:
    """Inodes of the sockets that listen on a port."""
    try:
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    except OSError:
        return []
    return [row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port]
