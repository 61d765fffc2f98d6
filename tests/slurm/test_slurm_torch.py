"""The real thing: torch, gloo, DeepSpeed on two nodes, preempted; against the same run undisturbed in one process."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from trichord.tracking.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from tiny_run import make_data

    return make_data(tmp_path_factory.mktemp("data"))


def arguments(data, root) -> list[str]:
    """The shipped tiny config on our own shards."""
    sources = {"scans": "it", "pairs": "iat", "speech": "at"}
    return [
        "debug/tiny.yaml",
        *(f"shards.sources.{name}.shards={data}/{files}-*.tar" for name, files in sources.items()),
        f"batches.tokenizer={data}/tokenizer",
        f"run.root={root}",
        f"run.max_steps={STEPS}",
        "checkpoints.save_every_steps=30",
        "engine.zero_stage=2",
    ]


def losses(folder):
    return {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}


def digest(folder):
    return json.loads((folder / f"checkpoints/step-{STEPS:06d}/manifest.json").read_text())["data_digest"]


@contextmanager
def undisturbed(data, root):
    """The same run in one process, which the number of ranks must not tell from four; its end is waited for."""
    command = [sys.executable, "-m", "trichord_launch.cli", "local", *arguments(data, root), "--procs", "1"]
    with open(root / "undisturbed.log", "wb") as log:
        process = subprocess.Popen([*command, "run.name=undisturbed"], stdout=log, stderr=log)
    try:
        yield
        assert process.wait(timeout=240) == 0, (root / "undisturbed.log").read_text()[-3000:]
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_a_preempted_run_is_the_undisturbed_one(world, data):
    root = world.folder / "runs"
    where = ["--cluster", world.cluster_file, "--nodes", 2, "--time", "20"]
    job = world.cluster.launch("slurm", *arguments(data, root), *where, "--submit").stdout.strip()
    world.run_folder = root / "tiny"
    world.wait_for(lambda: len(read_metrics(world.run_folder)) >= 3, 240, "three steps")
    world.preempt()
    with undisturbed(data, root):  # while the job is put back
        facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=240)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), world.tell()
        assert world.attempts() == [("stopped", "requeue"), ("finished", "leave")]
    assert digest(world.run_folder) == digest(root / "undisturbed")
    assert losses(world.run_folder) == pytest.approx(losses(root / "undisturbed"), rel=1e-6)
