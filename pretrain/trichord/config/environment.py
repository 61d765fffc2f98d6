"""What a run was made with: state of the code and versions of the software. Reads only; never fails."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "trichord",
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "timm",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "pillow",
    "soundfile",
    "webdataset",
    "wandb",
    "pydantic",
    "pyyaml",
    "fsspec",
)


def git_state(folder: Path | None = None) -> dict[str, str | bool | None]:
    """State of the git checkout around `folder` (default: the one this package runs from, else the working directory).

    Returns {"sha", "dirty", "diff_sha256"}: the commit, whether tracked files differ from it or new ones lie about, and
    a hash over those differences (None when clean). All None outside a repository or without git.
    """
    nothing: dict[str, str | bool | None] = {"sha": None, "dirty": None, "diff_sha256": None}
    for place in [folder] if folder else [Path(__file__).resolve().parent, Path.cwd()]:
        sha = _git(place, "rev-parse", "HEAD")
        if sha is None or (folder is None and _is_ignored(place)):
            continue
        diff = _git(place, "diff", "HEAD", "--binary") or b""
        status = _git(place, "status", "--porcelain") or b""
        changes = hashlib.sha256(diff + b"\0" + status).hexdigest() if status.strip() else None
        return {"sha": sha.decode().strip(), "dirty": changes is not None, "diff_sha256": changes}
    return nothing


def environment() -> dict[str, object]:
    """Versions of Python, the operating system and the packages a run depends on; None where one is not installed."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if _is_recorded(name)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_recorded(name: str) -> bool:
    """Variables that change what a run does. Anything that could be a secret stays out by naming what goes in."""
    return name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "SLURM_JOB_ID") or (
        name.startswith(("TRICHORD_", "NCCL_", "TORCH_NCCL_")) and "KEY" not in name and "TOKEN" not in name
    )


def _is_ignored(place: Path) -> bool:
    """True for a package inside a virtual environment that happens to lie in someone's repository."""
    return _git(place, "check-ignore", "-q", ".") is not None


def _git(place: Path, *arguments: str) -> bytes | None:
    """Output of a git command in `place`; None when it fails in any way."""
    try:
        done = subprocess.run(["git", "-C", str(place), *arguments], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
