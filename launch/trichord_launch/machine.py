"""What this machine has, found without torch: processor cores and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trichord.core.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """cores: processor cores this process may use; gpus: GPUs that torch could use."""

    cores: int
    gpus: int


def this_machine(environ: Mapping[str, str] | None = None) -> Machine:
    """The machine this runs on, as restricted by the CPU affinity and by CUDA_VISIBLE_DEVICES."""
    environ = os.environ if environ is None else environ
    return Machine(len(os.sched_getaffinity(0)), count_gpus(environ))


def count_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs a job with `environ` would see: none with DS_ACCELERATOR=cpu, else by device files or `nvidia-smi -L`."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in environ:
            return len([part for part in environ[name].split(",") if part.strip() not in ("", "-1")])
    nvidia = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if nvidia:
        return len(nvidia)
    if (devices / "kfd").exists():  # AMD: one render node per GPU
        return len(list((devices / "dri").glob("renderD*")))
    return _nvidia_smi(environ)


def require_fit(procs: int, machine: Machine) -> None:
    """Refuse more processes than GPUs: two on one GPU share its memory, and NCCL does not allow it.

    Raises:
        ConfigError: naming both numbers.
    """
    if machine.gpus and procs > machine.gpus:
        raise ConfigError(
            f"--procs {procs} needs {procs} GPUs, this machine has {machine.gpus}; "
            "start fewer processes, or set DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def _nvidia_smi(environ: Mapping[str, str]) -> int:
    """GPUs `nvidia-smi -L` lists: under WSL there is no device file."""
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return 0
    try:
        result = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", result.stdout, re.MULTILINE)) if result.returncode == 0 else 0
