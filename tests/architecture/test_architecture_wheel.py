"""The wheel: what is in it, what it asks for, and that a base install of it works in a clean environment."""

import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from import_graph import REPO, ROOTS, modules, project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROJECT = project()


def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=REPO)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and its base dependencies; its `bin` folder."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    made = run([sys.executable, "-m", "venv", str(folder)])
    assert made.returncode == 0, made.stderr
    done = run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)])
    if re.search(r"No matching distribution found for (?!trichord)|Connection|Temporary failure", done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_it_holds_every_module_every_config_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {str(file.relative_to(ROOTS[name.split(".")[0]])) for name, file in modules().items()}
    wanted |= {f"trichord/{file.relative_to(REPO)}" for file in (REPO / "configs").rglob("*.yaml")}
    assert not wanted - names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "docs", "runs", "data", "configs")]


def test_it_names_its_extras_and_scripts(metadata, wheel):
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0].lower() for line in base) == sorted(
        re.match(r"[\w-]+", line)[0].lower() for line in PROJECT["dependencies"]
    )


def test_a_base_install_has_no_torch_and_its_commands_answer(clean, tmp_path):
    assert run([str(clean / "python"), "-c", "import torch"]).returncode != 0
    for command in (["trichord", "--help"], ["trichord-launch", "--help"]):
        done = run([str(clean / command[0]), *command[1:]], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout
    done = run([str(clean / "trichord"), "config", "check", "runs/quickstart.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "site-packages/trichord/configs/runs/quickstart.yaml" in done.stdout


def test_a_base_install_says_which_extra_training_needs(clean, tmp_path):
    done = run([str(clean / "trichord"), "train", "debug/tiny.yaml"], cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'trichord[" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_base_install_stays_small(clean):
    listed = run([str(clean / "python"), "-m", "pip", "list", "--format=freeze"]).stdout.lower()
    for heavy in ("torch", "numpy", "transformers", "deepspeed", "triton", "wandb"):
        assert f"\n{heavy}==" not in f"\n{listed}"


def test_the_environment_that_runs_the_tests_satisfies_the_big_extras(wheel):
    """kernels, train and dev are gigabytes: `make` installs them once; here pip only resolves them against that."""
    done = run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", f"{wheel}[kernels,train,dev]"])
    assert done.returncode == 0, done.stderr


def test_the_small_extras_resolve_in_a_clean_environment(clean, wheel):
    done = run([str(clean / "python"), "-m", "pip", "install", "--quiet", "--dry-run", f"{wheel}[s3,ray]"])
    assert done.returncode == 0, done.stderr
