"""What this machine has, found without torch: processor cores and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trichord.core.errors import ConfigError, TrichordError

EXIT_MACHINE = 69  # BSD's EX_UNAVAILABLE


class MachineError(TrichordError):
    """A machine cannot be reached, or is not fit to train; nothing was started."""

    exit_code = EXIT_MACHINE


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
    visible = _visible(environ)
    return visible if visible is not None else _installed(environ, devices)


def count_devices(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that answer, of those `environ` lets a job see. One that fell off the bus keeps its device file."""
    has_tool = shutil.which("nvidia-smi", path=environ.get("PATH")) is not None
    answering = _nvidia_smi(environ) if has_tool else _installed(environ, devices)
    visible = _visible(environ)
    return answering if visible is None else min(visible, answering)


def _visible(environ: Mapping[str, str]) -> int | None:
    """How many GPUs the environment names; None where it names none."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in environ:
            return len([part for part in environ[name].split(",") if part.strip() not in ("", "-1")])
    return None


def _installed(environ: Mapping[str, str], devices: Path) -> int:
    """GPUs by device files, or by `nvidia-smi -L`."""
    nvidia = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if nvidia:
        return len(nvidia)
    if (devices / "kfd").exists():  # AMD: one render node per GPU
        return len(list((devices / "dri").glob("renderD*")))
    return _nvidia_smi(environ)


def device_memory_gib(environ: Mapping[str, str]) -> list[float]:
    """Memory of each GPU that answers, in GiB; empty where nvidia-smi is not there or says nothing of it."""
    text = _ask_nvidia_smi(environ, "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    return [int(line) / 1024 for line in text.split("\n") if line.strip().isdigit()]


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
    return len(re.findall(r"^GPU \d+:", _ask_nvidia_smi(environ, "-L"), re.MULTILINE))


def _ask_nvidia_smi(environ: Mapping[str, str], *words: str) -> str:
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return ""
    try:
        result = subprocess.run([tool, *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
