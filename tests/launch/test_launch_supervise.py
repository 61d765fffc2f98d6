"""The life of a job, with real processes and no torch: finish, stop, crash, restart, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trichord.core.errors import ConfigError
from trichord.core.status import read_status
from trichord_launch.command import Command
from trichord_launch.control import cancel
from trichord_launch.record import next_attempt
from trichord_launch.supervise import Reach, is_held, run_lock, supervise, tell

HERE = Path(__file__).parent
LIMIT_S = 30.0


class Launch:
    """A launcher in a process of its own, its output kept."""

    def __init__(self, folder, plan, procs=2, max_restarts=0):
        self.folder, self.procs = folder, procs
        arguments = [sys.executable, str(HERE / "fake_launcher.py"), str(folder), plan, str(procs), str(max_restarts)]
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def wait(self):
        try:
            self.said = self.process.communicate(timeout=LIMIT_S)[1]
        finally:
            self.process.kill()
        return self.process.returncode

    def ready(self):
        """Wait until all ranks of the first attempt run; returns their process ids."""
        wait_for(lambda: all(self.read(f"ready.{rank}") for rank in range(self.procs)))
        return [int(self.read(f"ready.{rank}").removeprefix("1 ")) for rank in range(self.procs)]

    @property
    def attempts(self):
        return len(list((self.folder / "attempts").iterdir()))

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else None

    def record(self, attempt, name):
        return json.loads((self.folder / "attempts" / str(attempt) / name).read_text())


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*arguments, **options):
        started.append(Launch(tmp_path / "run", *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()


def wait_for(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_run_that_finishes(launch):
    one = launch("finish")
    assert one.wait() == 0
    assert read_status(one.folder).outcome == "finished"
    assert one.record(1, "command.json")["environment"] == {"TRICHORD_ATTEMPT": "1"}
    assert one.record(1, "verdict.json")["outcome"] == "finished"
    assert not is_held(one.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_though_torchrun_would_kill(launch, number):
    one = launch("wait")
    one.ready()
    assert is_held(one.folder)
    os.killpg(one.process.pid, number)  # a Ctrl-C reaches the whole group of the terminal
    assert one.wait() == 75, one.said
    assert read_status(one.folder).outcome == "stopped"
    assert [one.read(f"signals.{rank}") for rank in range(2)] == ["1", "1"], "each rank is asked once"
    assert one.record(1, "verdict.json")["torchrun_exit_code"] == 0
    again = launch("wait,finish")
    assert again.wait() == 0
    assert again.record(2, "verdict.json")["outcome"] == "finished"


def test_a_crash_is_started_again_from_the_checkpoint(launch):
    one = launch("crash@7,finish", max_restarts=3)
    assert one.wait() == 0, one.said
    assert (one.attempts, one.record(1, "verdict.json")["outcome"]) == (2, "failed")
    assert one.record(1, "command.json")["argv"][-1] != "restart"
    assert one.record(2, "command.json")["argv"][-1] == "restart"
    assert read_status(one.folder).outcome == "finished"


def test_an_old_verdict_is_not_taken_for_a_new_one(launch):
    assert launch("finish").wait() == 0
    one = launch("finish,dead")
    assert one.wait() == 1
    assert read_status(one.folder).outcome == "failed"


def test_an_old_failure_of_a_rank_is_not_taken_for_a_new_one(launch):
    assert launch("fail@2=2").wait() == 2
    assert launch("fail@2=2,dead").wait() == 1


def test_a_crash_without_a_budget_ends_the_launch(launch):
    one = launch("crash@7,finish")
    assert one.wait() == 1
    assert "no restarts were asked for" in one.said
    assert read_status(one.folder).outcome == "failed", "the launcher speaks for ranks that could not"


def test_a_crash_at_the_same_step_is_not_tried_for_ever(launch):
    one = launch("fail@12=1", max_restarts=10)
    assert one.wait() == 1
    assert (one.attempts, "twice at step 12" in one.said) == (2, True)


def test_progress_between_crashes_uses_the_budget(launch):
    one = launch("fail@3=1,fail@8=1,fail@13=1,finish", max_restarts=2)
    assert one.wait() == 1
    assert (one.attempts, "budget of 2" in one.said) == (3, True)


@pytest.mark.parametrize("code", [2, 3, 4])
def test_errors_that_come_again_are_not_restarted_and_keep_their_code(launch, code):
    one = launch(f"fail@2={code}", max_restarts=5)
    assert one.wait() == code
    assert one.attempts == 1
    assert {said["exit_code"] for said in one.record(1, "verdict.json")["ranks"].values()} == {code}
    assert one.record(1, "verdict.json")["torchrun_exit_code"] == 1, "torchrun's own code would not have told"


def test_ctrl_c_twice_kills(launch):
    one = launch("deaf")
    pids = one.ready()
    one.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert one.process.poll() is None, "the first one waits for the ranks"
    one.process.send_signal(signal.SIGINT)
    assert one.wait() == 130
    assert all(gone(pid) for pid in pids)


def test_processes_that_outlive_the_job_are_ended(launch):
    one = launch("litter", procs=1)
    assert one.wait() == 0
    assert "ended 1 processes" in one.said
    assert gone(int(one.read("litter")))


def test_a_killed_launcher_leaves_no_job(launch):
    one = launch("wait")
    pids = one.ready()
    one.process.kill()
    one.process.wait()
    wait_for(lambda: all(gone(pid) for pid in pids))
    assert not is_held(one.folder)


def test_a_stop_between_attempts_is_the_end(launch):
    one = launch("wait,finish", max_restarts=1)
    for pid in one.ready():
        os.kill(pid, signal.SIGKILL)
    one.process.send_signal(signal.SIGTERM)
    assert one.wait() in (1, 143)
    assert one.attempts == 1


def test_a_run_has_one_launcher(launch, tmp_path):
    with run_lock(tmp_path / "run"):
        one = launch("finish")
        with pytest.raises(ConfigError, match=r"in use by another launcher \(process \d+"), run_lock(tmp_path / "run"):
            pass
        assert one.wait() == 1
        assert "ConfigError" in one.said
    assert next_attempt(tmp_path / "run") == 1, "nothing was started"


def test_attempts_count_on(tmp_path):
    for name in ("1", "2", "10", "notes"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    assert next_attempt(tmp_path) == 11


@pytest.mark.parametrize(("plan", "now", "code"), [("wait", False, 75), ("deaf", True, 128 + signal.SIGTERM)])
def test_a_run_is_cancelled_from_another_terminal(launch, plan, now, code):
    run = launch(plan)
    run.ready()
    assert f"process {run.process.pid} " in cancel(run.folder, now)
    assert run.wait() == code, run.said
    with pytest.raises(ConfigError, match="nothing of run"):
        cancel(run.folder)


def test_a_closed_terminal_takes_no_job_with_it(monkeypatch):
    """Of it comes a SIGHUP, and what is said of that cannot be written any more."""

    class Closed:
        def write(self, _text):
            raise OSError(5, "Input/output error")

        flush = write

    monkeypatch.setattr("sys.stderr", Closed())
    tell("asked 2 ranks to save and stop")


LOSES_A_HOST = """
import sys, pathlib
from trichord.core.status import Status, write_atomically, write_status
folder, attempt = pathlib.Path(sys.argv[1]), sys.argv[2]
write_status(folder, Status("stopped", 75, 7, "saved") if attempt == "1" else Status("finished", 0, 9, "done"))
if attempt == "1":
    write_atomically(folder / "attempts/1/hosts/lost.json", '{"n2": "the connection to it broke"}')
"""


@pytest.mark.parametrize(("left", "outcome"), [("", "finished"), ("n2: ranks may be left", "stopped")])
def test_after_a_lost_host_nothing_starts_before_it_is_clear(tmp_path, left, outcome):
    asked, said = [], []

    def clear(attempt, verdict, _signals):
        asked.append((attempt, verdict.hosts_lost))
        return left

    def command_of(attempt, _restart):
        return Command((sys.executable, "-c", LOSES_A_HOST, str(tmp_path), str(attempt)), {})

    reach = Reach(clear=clear)
    verdict = supervise(tmp_path, command_of, max_restarts=1, restart_pause_s=0.0, reach=reach, say=said.append)
    assert verdict.outcome == outcome
    assert asked == [(1, {"n2": "the connection to it broke"})]
    assert any(line.startswith("not started again: n2: ranks may be left") for line in said) == bool(left)
