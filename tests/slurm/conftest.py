"""A real Slurm of three nodes for the whole session. Every test here is marked `slurm`."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from slurm_world import Cluster, World

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"


def why_not() -> str:
    """What is missing for a Slurm of our own, and how to get it; empty where it can be started."""
    if os.geteuid() != 0:
        return "needs root, for nodes with networks of their own: `make test` as root, or in a privileged container"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install -y {PACKAGES}"
    if subprocess.run(["unshare", "-n", "-m", "-u", "-p", "-f", "true"], capture_output=True, timeout=20).returncode:
        return "needs namespaces (CAP_SYS_ADMIN): run in a privileged container, docker run --privileged"
    return ""


def pytest_collection_modifyitems(items):
    reason = None
    for item in items:
        if not Path(item.fspath).is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.slurm)
        item.add_marker(pytest.mark.timeout(240))
        reason = why_not() if reason is None else reason
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="trichord-slurm-"))
    folder.chmod(0o755)  # munge wants every folder above its socket to be open
    cluster = Cluster(folder / "cluster")
    try:
        cluster.script("start", "-n", "3", "-g", "2", "-c", "4")
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def world(cluster, tmp_path):
    """A config, a cluster file and a folder for runs; whatever a test leaves in the queue is taken out."""
    cluster.make_whole()
    world = World(cluster, tmp_path)
    yield world
    cluster.clear()
