"""`trichord-launch hosts`: two hosts over a real ssh, torch and gloo, against the same run on this machine alone."""

import subprocess
import sys

import pytest
from tiny_run import make_data, write_config

from hosts_world import HOSTS, missing, start_sshd
from trichord.tracking.metrics import read_metrics

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


def launch(*words):
    done = subprocess.run(
        [sys.executable, "-m", "trichord_launch.cli", *words], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]


def test_two_hosts_train_as_two_processes_of_one_do(tmp_path, monkeypatch):
    ssh = start_sshd(tmp_path)
    config = str(write_config(make_data(tmp_path), tmp_path / "runs"))
    (tmp_path / "pair.yaml").write_text(
        f"name: pair\nnodes: 2\ngpus_per_node: 1\nnetwork_interface: lo\npython: {sys.executable}\n"
        "env: {OMP_NUM_THREADS: '1'}\n"  # sums of another number of threads round differently
    )
    words = ["engine.zero_stage=2", "run.max_steps=6"]
    try:
        where = ["--hosts", ",".join(HOSTS), "--procs", "1", "--ssh-config", str(ssh.config)]
        launch(
            *("hosts", config, *words, "run.name=far", *where),
            *("--cluster", str(tmp_path / "pair.yaml"), "--start"),
        )
    finally:
        ssh.server.terminate()
        ssh.server.wait()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch("local", config, *words, "run.name=near", "--procs", "2")
    far, near = (
        {row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "runs" / name) if "train/loss" in row}
        for name in ("far", "near")
    )
    assert len(near) == 6
    assert far == near
