"""Is this node fit to train? One task per node runs this before the ranks do, without torch and without the others.

    python -m trichord_launch.node_check OUT RUN_FOLDER --gpus N --disk-gib X --shm-gib X
        [--gpu-gib X] [--commit] [--port N] [--token FILE TEXT] [--see PATH ...] [--command LINE ...]

Writes `OUT/NODE.json`: problems (empty: fit) and facts. The exit code is always 0: a node that fails its check is for
others to judge (`node_problems.py`), not for srun.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from trichord.config.environment import git_state
from trichord.core.status import write_atomically
from trichord_launch.machine import count_devices, device_memory_gib
from trichord_launch.node_problems import Problem
from trichord_launch.ports import free_port, holder, is_free

PACKAGES = ("trichord", "torch", "triton", "deepspeed", "transformers", "numpy")
_COMMAND_TIMEOUT_S = 60.0
_GIB = 2**30
_SAME_MEMORY = 0.97  # what a driver keeps for itself differs by a percent or two


def main(argv: Sequence[str] | None = None) -> None:
    """Look at this node and write down what was found."""
    asked = _arguments(argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    devices, memory = count_devices(os.environ) if asked.gpus else 0, device_memory_gib(os.environ)
    problems = [
        *_device_problems(asked, devices, memory),
        *_space_problems("disk", asked.run_folder, asked.disk_gib),
        *_space_problems("disk", Path(tempfile.gettempdir()), asked.disk_gib),
        *_space_problems("shm", Path("/dev/shm"), asked.shm_gib),
        *_write_problems(asked.run_folder),
        *(_token_problems(Path(asked.token[0]), asked.token[1]) if asked.token else ()),
        *(Problem("see", f"{path} is not there") for path in asked.see if not Path(path).exists()),
        *(problem for line in asked.command for problem in _command_problems(line)),
    ]
    port = free_port(asked.port) if asked.port else None
    problems += _port_problems(port) if port else []
    facts = {
        "node": node,
        "problems": [problem.to_json() for problem in problems],
        "versions": {**versions(), "commit": _commit()} if asked.commit else versions(),
        "devices": devices,
        "device_gib": round(min(memory), 1) if asked.gpus and memory else None,
        "seen": len(asked.see),
        "port": port,
        "time": time.time(),
    }
    write_atomically(asked.out / f"{node}.json", json.dumps(facts, indent=2) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Is this node fit to train?")
    parser.add_argument("out", type=Path)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu-gib", type=float, default=0.0)
    parser.add_argument("--disk-gib", type=float, required=True)
    parser.add_argument("--shm-gib", type=float, required=True)
    parser.add_argument("--commit", action="store_true", help="Compare the commit of the code, too.")
    parser.add_argument("--token", nargs=2, metavar=("FILE", "TEXT"))
    parser.add_argument("--port", type=int, help="Find a free one from this one on.")
    parser.add_argument("--see", action="append", default=[])
    parser.add_argument("--command", action="append", default=[])
    return parser.parse_args(argv)


def versions() -> dict[str, str | None]:
    """Versions of the interpreter and of what must be the same on all nodes; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Of the checkout that runs here; None where it is none, but an installed package."""
    sha = git_state(Path(__file__).resolve().parent)["sha"]
    return str(sha)[:12] if sha else None


def _device_problems(asked: argparse.Namespace, devices: int, memory: list[float]) -> Iterator[Problem]:
    if devices < asked.gpus:
        yield Problem("devices", f"{devices} of {asked.gpus} GPUs")
    if asked.gpus and memory and min(memory) < _SAME_MEMORY * asked.gpu_gib:
        yield Problem("device memory", f"a GPU has {min(memory):.1f} GiB of memory, {asked.gpu_gib:.1f} are needed")


def _space_problems(kind: str, folder: Path, wanted_gib: float) -> list[Problem]:
    try:
        free = shutil.disk_usage(folder).free / _GIB
    except OSError as error:
        return [Problem(kind, f"{folder}: {error.strerror}")]
    return [] if free >= wanted_gib else [Problem(kind, f"{free:.3g} GiB free in {folder}, {wanted_gib:g} wanted")]


def _write_problems(folder: Path) -> list[Problem]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".node-check-"):
            return []
    except OSError as error:
        return [Problem("run folder", f"{folder} cannot be written: {error.strerror}")]


def _token_problems(file: Path, text: str) -> list[Problem]:
    """Whether this is the folder that the others see, and not one of the same name on this node's own disk."""
    try:
        found = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        return [Problem("shared folder", f"{file}: {error.strerror}, but it was written before the nodes were asked")]
    return [] if found == text else [Problem("shared folder", f"{file} holds {found[:40]!r}, not {text!r}")]


def _port_problems(port: int) -> list[Problem]:
    return [] if is_free(port) else [Problem("port", f"port {port} and those after it are in use{holder(port)}")]


def _command_problems(line: str) -> list[Problem]:
    try:
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Problem("command", f"`{line}` took more than {_COMMAND_TIMEOUT_S:.0f} s")]
    if done.returncode == 0:
        return []
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return [Problem("command", f"`{line}` ended with {done.returncode}" + (f" ({said[0][:200]})" if said else ""))]


if __name__ == "__main__":
    sys.exit(main())
