"""The same mechanics under the real torchrun: what it does with signals, crashes and exit codes is measured here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trichord.core.status import read_status

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HERE = Path(__file__).parent
LIMIT_S = 120.0
CONFIG = """\
run: {name: fake, root: ROOT, max_steps: 20}
shards: {sources: [{name: photos, shards: data/photos.tar}]}
batches: {tokenizer: data/tokenizer, rows_per_step: 4}
fusion: {kind: none}
encoders: {vision: {}, text: {}}
objectives: {contrastive: {pairs: [image-text]}}
"""
LAUNCHER = """\
import sys
from trichord_launch.local import launch_local
config, rank, folder, plan = sys.argv[1:5]
verdict = launch_local(config, ["run.resume=never"], procs=2, max_restarts=2, entry=(rank, folder, plan))
sys.exit(verdict.exit_code)
"""


@pytest.fixture
def launch(tmp_path):
    config = tmp_path / "fake.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path / "runs")))
    folder = tmp_path / "runs" / "fake"
    processes = []

    def start(plan):
        arguments = [sys.executable, "-c", LAUNCHER, str(config), str(HERE / "fake_rank.py"), str(folder), plan]
        processes.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True))
        return processes[-1], folder

    yield start
    for process in processes:
        process.kill()


def test_a_run_that_finishes(launch):
    process, folder = launch("finish")
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 0, said
    assert read_status(folder).outcome == "finished"
    caught = list(folder.glob("attempts/1/torchrun/*/attempt_0/*/stderr.log"))
    assert len(caught) == 2, "each rank's output is kept"


def test_ctrl_c_saves_and_stops(launch):
    process, folder = launch("wait")
    deadline = time.monotonic() + LIMIT_S
    while not all((folder / f"ready.{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 75, said
    assert [(folder / f"signals.{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert json.loads((folder / "attempts/1/verdict.json").read_text())["torchrun_exit_code"] == 0


def test_a_crash_is_started_again_and_a_known_error_is_not(launch):
    process, folder = launch("crash@7,fail@15=3")
    said = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 3, said
    assert sorted(path.name for path in (folder / "attempts").iterdir()) == ["1", "2"]
    assert "Traceback" not in said, said
    assert "attempt 1 failed at step 0: rank" in said
    assert "died of SIGKILL" in said
    command = json.loads((folder / "attempts/2/command.json").read_text())
    assert command["argv"][-1] == "run.resume=auto", "`never` would refuse the run that the first start has made"
