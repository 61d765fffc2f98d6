"""The port at which ranks meet, on the machine that hosts it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from trichord_launch.ports import PORTS, free_port, holder, is_free
from trichord_launch.preflight.finding import Finding


def check_port(port: int | None, environ: Mapping[str, str]) -> Finding:
    """Whether the port is free here. None: MASTER_PORT, and where that is not set one of the launcher's own."""
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    named = environ.get("MASTER_PORT", "")
    wanted = port if port is not None else int(named) if named.isdigit() else None
    if wanted is None:
        wanted = free_port(PORTS.start)
        if is_free(wanted):
            return Finding("port", "pass", f"{wanted} is free on {here}; the launcher takes a free one for every start")
        return Finding(
            "port", "fail", f"no port from {PORTS.start} on is free on {here}", "end what listens there: `ss -tlnp`"
        )
    if is_free(wanted):
        return Finding("port", "pass", f"{wanted} is free on {here}")
    remedy = "name another port, or none (--port, MASTER_PORT): the launcher then takes a free one"
    return Finding("port", "fail", f"{wanted} is in use on {here}{holder(wanted)}", f"{remedy}; or end its holder")
