"""Every command of docs/guides/slurm.md, in its order, on a real Slurm."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_rank import TOTAL_STEPS, digest_of
from slurm_world import CLUSTER, CONFIG, HERE

from trichord.config.load import load_cluster

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "slurm.md"


def commands() -> list[list[str]]:
    """The words of each command, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("trichord-launch")]


@pytest.fixture
def home(world, monkeypatch):
    """A folder with the files that the guide names, as the working directory of the login node."""
    monkeypatch.chdir(world.folder)
    Path("mine.yaml").write_text(CONFIG.replace("ROOT", "runs").replace("name: fake", "name: mine"))
    world.run_folder = world.folder / "runs" / "mine"
    return world


def complete(path: str, **more) -> None:
    """What a user does with a draft: name the interpreter, and small nodes."""
    text = f"python: {HERE}/fake_python.sh\n" + CLUSTER.split("gpus_per_node: 2\n")[1]
    head = "".join(f"{line}\n" for line in ("name: mycluster", "nodes: 3", "gpus_per_node: 2"))
    for old, new in more.items():
        text = text.replace("partition: low", f"partition: low, {old}: {new}")
    Path(path).write_text(head + text)


def run_guide_command(home, words: list[str]) -> str:
    done = home.cluster.launch(*words[1:])
    return done.stdout + done.stderr


def test_every_command_of_the_guide(home):
    told = commands()
    home.cluster.environment["FAKE_STEP_S"] = "0.3"
    example, new, show, submit, status, logs, job_log, attach, shell, cancel, chain, grid = told

    assert "1 run of 1 x 8 = 8 ranks" in run_guide_command(home, example)
    run_guide_command(home, new)
    drafted = load_cluster("mycluster.yaml")
    assert (drafted.nodes, drafted.gpus_per_node, drafted.slurm.partition) == (3, 2, "low")
    complete("mycluster.yaml")
    complete("norequeue.yaml", requeue="false")

    assert "#SBATCH --time=12:00:00" in run_guide_command(home, show)
    job = run_guide_command(home, submit).split()[0]
    home.wait_step(3)
    assert f"job         {job} running on n" in run_guide_command(home, status)
    assert "rank 1 on n1" in follow(home, logs)
    assert "attempt 1: 4 ranks" in run_guide_command(home, job_log)
    assert run_guide_command(home, attach).split()[0] in ("n1", "n2", "n3")
    assert "--pty bash -l" in run_guide_command(home, [*shell, "--dry-run"])
    assert f"job {job} asked to save and stop" in run_guide_command(home, cancel)
    home.wait_state(job, "FAILED")
    assert home.outcome() == ("stopped", 75), home.tell()
    assert home.attempts() == [("stopped", "leave")]
    assert "not in the queue here any more" in run_guide_command(home, status)

    home.cluster.environment["FAKE_STEP_S"] = "0.02"
    links = run_guide_command(home, chain).split()[:4]
    home.wait_state(links[0], "COMPLETED", "FAILED")
    assert home.outcome() == ("finished", 0), home.tell()
    assert home.checkpoints() == {f"{TOTAL_STEPS} {digest_of(TOTAL_STEPS)}"}, "goes on from where it was cancelled"
    assert home.wait_state(links[3], "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"

    array = run_guide_command(home, grid).split()[0]
    for cell in range(4):
        assert home.wait_state(f"{array}_{cell}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert (home.folder / "runs/mine-lr-1e-4-seed-1/attempts/1/verdict.json").is_file()


def follow(home, words: list[str]) -> str:
    """The first line it prints: it never ends by itself."""
    command = ["bash", str(HERE / "mini_cluster.sh"), "run", "timeout", "--foreground", "40"]
    command += [sys.executable, "-m", "trichord_launch.cli", *words[1:]]
    environment = home.cluster.environment
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
    return line
