"""Environment of every test: one thread, no network, the CPU unless there is a GPU. Imports no torch."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists() or shutil.which("rocm-smi") is not None

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# What tests index and fetch must not fill the user's own cache.
os.environ["TRICHORD_CACHE"] = tempfile.mkdtemp(prefix="trichord-test-cache-")
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed looks for ninja, and torchrun is started by name: both stand beside the interpreter.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` say that there is none instead of failing one by one."""
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["TRICHORD_CACHE"], ignore_errors=True)
