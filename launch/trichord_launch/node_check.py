"""Is this node fit to train? One task per node runs this before the ranks do, without torch and without the others.

    python -m trichord_launch.node_check OUT RUN_FOLDER --gpus N --disk-gib X --shm-gib X [--command LINE ...]

Writes `OUT/NODE.json`: problems (empty: fit) and facts. The exit code is always 0: a node that fails its check is for
the batch process to judge, not for srun.
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
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from trichord.core.status import write_atomically
from trichord_launch.machine import count_devices

PACKAGES = ("trichord", "torch", "triton", "deepspeed", "transformers", "numpy")
_COMMAND_TIMEOUT_S = 60.0
_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    """Look at this node and write down what was found."""
    parser = argparse.ArgumentParser(description="Is this node fit to train?")
    parser.add_argument("out", type=Path)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--disk-gib", type=float, required=True)
    parser.add_argument("--shm-gib", type=float, required=True)
    parser.add_argument("--command", action="append", default=[])
    asked = parser.parse_args(argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problems = [
        *_gpu_problems(asked.gpus),
        *_space_problems(asked.run_folder, asked.disk_gib),
        *_space_problems(Path(tempfile.gettempdir()), asked.disk_gib),
        *_space_problems(Path("/dev/shm"), asked.shm_gib),
        *_write_problems(asked.run_folder),
        *(problem for line in asked.command for problem in _command_problems(line)),
    ]
    facts = {"node": node, "problems": problems, "versions": versions(), "time": time.time()}
    write_atomically(asked.out / f"{node}.json", json.dumps(facts, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Versions of the interpreter and of what must be the same on all nodes; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def bad_nodes(reports: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Node -> why it is not fit, from what the nodes reported (None: nothing).

    Where versions differ, the nodes that differ from most are the bad ones.
    """
    bad = {node: "it did not answer" for node, report in reports.items() if not report}
    answered = {node: report for node, report in reports.items() if report}
    common = {}
    for name in ("python", *PACKAGES):
        counts = Counter(report["versions"].get(name) for report in answered.values())
        common[name] = counts.most_common(1)[0][0] if counts else None
    for node, report in answered.items():
        differing = [
            f"{name} {report['versions'].get(name)}, on most nodes {usual}"
            for name, usual in common.items()
            if report["versions"].get(name) != usual
        ]
        if problems := [*report["problems"], *differing]:
            bad[node] = "; ".join(problems)
    return bad


def _gpu_problems(wanted: int) -> list[str]:
    if not wanted:
        return []
    found = count_devices(os.environ)
    return [] if found >= wanted else [f"{found} of {wanted} GPUs"]


def _space_problems(folder: Path, wanted_gib: float) -> list[str]:
    try:
        free = shutil.disk_usage(folder).free / _GIB
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    return [] if free >= wanted_gib else [f"{free:.1f} GiB free in {folder}, {wanted_gib:g} wanted"]


def _write_problems(folder: Path) -> list[str]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".node-check-"):
            return []
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]


def _command_problems(line: str) -> list[str]:
    try:
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"`{line}` took more than {_COMMAND_TIMEOUT_S:.0f} s"]
    if done.returncode == 0:
        return []
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return [f"`{line}` ended with {done.returncode}" + (f" ({said[0][:200]})" if said else "")]


if __name__ == "__main__":
    sys.exit(main())
