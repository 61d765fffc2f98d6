"""The Makefile: one install, kept; clear words where something is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from import_graph import REPO

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with only what the Makefile looks at."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("VENV", "MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")}
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def fake_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_first_call_installs_once_and_later_calls_do_not(checkout):
    assert make(checkout, "-n", "quickstart").stdout.count("pip install") == 1
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    assert "pip install" not in make(checkout, "-n", "quickstart", "test").stdout
    os.utime(checkout / "pyproject.toml", (2**31, 2**31))  # dependencies changed
    assert make(checkout, "-n", "test").stdout.count("pip install") == 1


def test_another_environment_is_used_as_it_is(checkout):
    fake_program(checkout / "other" / "bin" / "python", "exit 0")
    shown = make(checkout, "-n", "test", "VENV=other", "ARGS=-k x").stdout
    assert "pip install" not in shown
    assert 'other/bin/python -m pytest -m "not gpu" -k x' in shown
    gone = make(checkout, "test", "VENV=nowhere")
    assert gone.returncode == 2
    assert "VENV=nowhere holds no bin/python" in gone.stderr


def test_an_old_or_missing_python_is_named(checkout):
    old = fake_program(checkout / "old", 'if [ "$1" = -V ]; then echo Python 3.8.2; else exit 1; fi')
    done = make(checkout, "quickstart", f"PYTHON={old}")
    assert done.returncode == 2
    assert "needs Python 3.10 or newer" in done.stderr
    assert "Python 3.8.2" in done.stderr
    assert "install Python 3.10 or newer" in make(checkout, "quickstart", "PYTHON=/no/python").stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists(), reason="there is a GPU")
def test_gpu_tests_without_a_gpu_say_so(checkout):
    fake_program(checkout / "other" / "bin" / "python", "exit 0")
    done = make(checkout, "gpu", "VENV=other")
    assert done.returncode == 2  # make's own; the recipe leaves with 3
    assert "no GPU" in done.stderr
    assert "Error 3" in done.stderr


def test_on_a_gpu_tests_come_first_then_the_sweep_then_the_benches(checkout):
    fake_program(checkout / "other" / "bin" / "python", "exit 0")
    shown = make(checkout, "-n", "gpu", "VENV=other", "HAS_GPU=/dev/nvidiactl", "ARGS=-x").stdout
    assert [line.split("python -m ")[1] for line in shown.splitlines() if "python -m" in line] == [
        "pytest -m gpu -x",
        "trichord_kernels.tables.sweep --log docs/log.md",
        "trichord.cli bench kernels --device cuda --log docs/log.md",
    ]


def test_ci_runs_make_test_and_nothing_else():
    """What some tests use (a browser, Slurm) is fetched where that takes seconds, and missed by none where it cannot
    be."""
    text = (REPO / ".ci" / "run").read_text()
    fetching = re.findall(r"^if .*?^fi\n", text, re.MULTILINE | re.DOTALL)
    for block in fetching:
        text = text.replace(block, "")
        assert block.rstrip().removesuffix("fi").rstrip().endswith("|| true")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test"]
    assert ["chromium" in fetching[0], "slurmctld" in fetching[1]] == [True, True]
    assert os.access(REPO / ".ci" / "run", os.X_OK)
