"""The step that trains, with processes in place of srun and notes in place of Slurm."""

import signal
import sys
import time

import pytest

from trichord.core.status import Status, write_rank_status, write_status
from trichord_launch import scheduler, training_step
from trichord_launch.batch import Batch
from trichord_launch.command import Command
from trichord_launch.job import SlurmJob
from trichord_launch.record import begin_attempt
from trichord_launch.scheduler import SchedulerError
from trichord_launch.training_step import TrainingStep

# What srun does with a step whose end is asked for: it ends itself.
SLEEPER = [sys.executable, "-c", "import time; time.sleep(30)"]


class Signals:
    def __init__(self, *received):
        self.received = list(received)


@pytest.fixture
def slurm(monkeypatch):
    """What was asked of Slurm; `facts` is what it says of the job."""
    asked, facts = [], {"JobState": "RUNNING"}
    monkeypatch.setattr(scheduler, "job_facts", lambda job_id, tries=3: facts)
    monkeypatch.setattr(scheduler, "signal_steps", lambda job_id, name: asked.append(name))
    monkeypatch.setattr(scheduler, "kill_steps", lambda job_id: asked.append("kill"))
    monkeypatch.setattr(training_step, "_KILLED_WAIT_S", 0.2)
    monkeypatch.setattr(training_step, "_LOOK_EVERY_S", 0.1)
    return asked, facts


@pytest.fixture
def step(tmp_path):
    def make(*received, argv=SLEEPER):
        begin_attempt(tmp_path, 1, Command(tuple(argv), {}))
        said = []
        return TrainingStep(tmp_path, 1, Command(tuple(argv), {}), "7", Signals(*received), said.append), said

    return make


def seconds(run):
    started = time.monotonic()
    run()
    return time.monotonic() - started


def test_before_training_began_there_is_nothing_to_save(step, slurm):
    one, said = step(signal.SIGUSR1)
    assert seconds(one.run) < 10
    assert slurm[0] == ["kill"]
    assert said[0] == "SIGUSR1: stopping before training began"


def test_ranks_that_train_are_asked_once_and_killed_before_the_time_is_up(step, slurm, tmp_path):
    one, said = step(signal.SIGUSR1, signal.SIGUSR1)
    write_status(tmp_path, Status("running", 0, 5, attempt=1))
    slurm[1]["EndTime"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 4))
    assert 1 < seconds(one.run) < 10
    assert slurm[0] == ["USR1", "kill"]
    assert said == ["SIGUSR1: asking the ranks to save and stop", "killing what is left of the step"]


def test_what_slurm_ends_itself_is_left_to_it(step, slurm):
    one, said = step(signal.SIGTERM, argv=["sleep", "1"])
    slurm[1]["JobState"] = "CANCELLED"
    one.run()
    assert slurm[0] == []
    assert "Slurm is ending" in said[0]


def test_a_step_that_does_not_end_after_a_rank_failed_is_killed(step, slurm, tmp_path, monkeypatch):
    """srun waits for a node that is gone until Slurm gives it up, which may take five minutes."""
    monkeypatch.setattr(training_step, "_END_LIMITS_S", {"failed": 1.0, "finished": 60.0, "stopped": 60.0})
    one, said = step()
    write_rank_status(tmp_path, 2, Status("failed", 1, 5, "rank 3 has shown no sign of life", 1))
    assert 0.9 < seconds(one.run) < 10
    assert slurm[0] == ["kill"]
    assert said == ["killing what is left of the step"]


def test_a_slurm_that_does_not_answer_ends_nothing(step, slurm, monkeypatch):
    def fail(*_arguments):
        raise SchedulerError("`scancel` failed: no answer within 60 s")

    monkeypatch.setattr(scheduler, "kill_steps", fail)
    one, said = step(signal.SIGUSR1)
    assert seconds(one.run) < 10
    assert "no answer" in said[-1]


def test_steps_are_killed_and_the_job_is_not(monkeypatch):
    """`scancel --signal=KILL JOB` would cancel the job itself."""
    asked = []
    answers = {"squeue": "7.batch\n7.extern\n7.0\n7.3\n"}
    monkeypatch.setattr(scheduler, "run", lambda *argv, **_: asked.append(argv) or answers.get(argv[0], ""))
    scheduler.kill_steps("7")
    assert asked[-1] == ("scancel", "7.0", "7.3")


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """A batch process whose Slurm is told what to say."""
    monkeypatch.setattr(scheduler, "host_names", lambda nodes: nodes.split(","))
    folder = tmp_path / "runs" / "digits"
    submission = folder / "submissions" / "1"
    submission.mkdir(parents=True)
    job = SlurmJob("digits", str(folder), str(submission), str(submission / "config.yaml"), "auto", 1, 2)
    environ = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "101"}
    return Batch(job, Signals(), environ), submission


def test_a_job_that_slurm_itself_requeues_for_ever_ends(batch, capsys):
    one, submission = batch
    assert one.live() == 75
    assert "requeued the job 101 times, 100 are allowed" in (submission / "ended.json").read_text()
    assert one.live() == 0, "a job of a chain that comes after has nothing to do"
    assert "nothing to do: Slurm has requeued" in capsys.readouterr().err


def test_a_cancelled_run_does_not_start_again(batch):
    one, submission = batch
    (submission / "cancel").touch()
    assert one.live() == 0
