"""The port at which ranks meet, on the machine that hosts it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from trichord_launch.preflight.finding import Finding
from trichord_launch.steps import PORTS
from trichord_launch.training_step import free_port

_LISTENS = "0A"  # a state in /proc/net/tcp


def check_port(port: int | None, environ: Mapping[str, str]) -> Finding:
    """Whether the port is free here. None: MASTER_PORT, and where that is not set one of the launcher's own."""
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    named = environ.get("MASTER_PORT", "")
    wanted = port if port is not None else int(named) if named.isdigit() else None
    if wanted is None:
        wanted = free_port(PORTS.start)
        if _is_free(wanted):
            return Finding("port", "pass", f"{wanted} is free on {here}; the launcher takes a free one for every start")
        return Finding(
            "port", "fail", f"no port from {PORTS.start} on is free on {here}", "end what listens there: `ss -tlnp`"
        )
    if _is_free(wanted):
        return Finding("port", "pass", f"{wanted} is free on {here}")
    remedy = "name another port, or none (--port, MASTER_PORT): the launcher then takes a free one"
    return Finding("port", "fail", f"{wanted} is in use on {here}{_holder(wanted)}", f"{remedy}; or end its holder")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    """Who listens there, as far as this user may see it."""
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
