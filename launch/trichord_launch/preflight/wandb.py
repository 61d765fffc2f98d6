"""Weights & Biases: can it be reached, or will the run write offline? Training goes on either way."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from trichord.config.run import RunConfig
from trichord.tracking.wandb import has_api_key, resolve_mode
from trichord_launch.preflight.finding import Finding

_TIMEOUT_S = 5.0
_OFFLINE = "it writes offline; `trichord track sync RUN` uploads later"


def check_wandb(config: RunConfig, environ: Mapping[str, str] | None = None) -> Finding:
    """What W&B will do on this machine. environ: None: this process's."""
    environ = os.environ if environ is None else environ
    wanted = config.tracking.wandb.mode
    if wanted == "online" and not has_api_key(environ):
        return Finding("wandb", "warn", f"online is asked for, and no API key is configured: {_OFFLINE}", "wandb login")
    mode = resolve_mode(wanted, environ)
    if mode == "off":
        return Finding("wandb", "pass", "off; metrics.jsonl is the record")
    if mode == "offline":
        return Finding("wandb", "pass", f"offline: {_OFFLINE}")
    host, port = _server(environ)
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return Finding("wandb", "pass", f"{host}:{port} answers")
    except OSError as error:
        remedy = "open the way to it, or set tracking.wandb.mode=offline and run `trichord track sync RUN` later"
        return Finding("wandb", "warn", f"{host}:{port} cannot be reached from here ({error})", remedy)


def _server(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port that are talked to first: the proxy's, where there is one."""
    url = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    names = (f"{url.scheme}_proxy", f"{url.scheme}_proxy".upper())
    proxy = next((environ[name] for name in names if environ.get(name)), None)
    if proxy is not None:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
