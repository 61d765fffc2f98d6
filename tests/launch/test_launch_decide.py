"""What comes after an attempt, what is remembered of attempts, and which nodes are not fit."""

import json
import os
import time

import pytest

from trichord.core.errors import ConfigError
from trichord.core.status import Status, read_status, write_status
from trichord_launch.command import Command
from trichord_launch.decide import Situation, decide
from trichord_launch.grid import expand_grid
from trichord_launch.job import Budget
from trichord_launch.machine import count_devices
from trichord_launch.node_check import main, versions
from trichord_launch.node_problems import Asked, bad_nodes
from trichord_launch.nodes import too_many
from trichord_launch.ports import free_port
from trichord_launch.record import PastAttempt, begin_attempt, end_attempt, has_begun, past_attempts
from trichord_launch.scheduler import end_time, parse_job
from trichord_launch.training_step import clear_stale_locks
from trichord_launch.verdict import Verdict, first_death

FINISHED, STOPPED = Verdict("finished", 0, 40, "all steps done"), Verdict("stopped", 75, 20, "stopped by SIGUSR1")
CRASHED, CONFIG = Verdict("failed", 1, 20, "died"), Verdict("failed", 2, 20, "wrong key")


def past(step, crashed=True):
    return PastAttempt(1, "failed", 1, step, crashed)


@pytest.mark.parametrize(
    ("situation", "action", "code", "for_good"),
    [
        ({"verdict": FINISHED}, "leave", 0, True),
        ({"verdict": FINISHED, "asked": True}, "leave", 0, True),
        ({"verdict": STOPPED, "asked": True}, "requeue", 75, False),
        ({"verdict": STOPPED, "asked": False}, "requeue", 75, False),  # preempted: only the ranks were told
        ({"verdict": STOPPED, "state": ""}, "requeue", 75, False),  # Slurm did not answer
        ({"verdict": STOPPED, "state": "CANCELLED"}, "leave", 75, False),
        ({"verdict": STOPPED, "state": "COMPLETING"}, "leave", 75, False),
        ({"verdict": STOPPED, "cancelled": True}, "leave", 75, True),
        ({"verdict": STOPPED, "requeues": 5}, "leave", 75, True),
        ({"verdict": STOPPED, "can_requeue": False, "links_left": 1}, "leave", 75, False),
        ({"verdict": STOPPED, "can_requeue": False}, "leave", 75, False),
        ({"verdict": CONFIG}, "leave", 2, True),
        ({"verdict": CONFIG, "asked": True}, "leave", 2, True),
        ({"verdict": CRASHED}, "restart", 0, False),
        ({"verdict": CRASHED, "asked": True}, "requeue", 75, False),  # could not save in time
        ({"verdict": CRASHED, "state": "COMPLETING"}, "leave", 1, False),  # its node died
        ({"verdict": CRASHED, "earlier": [past(20)]}, "leave", 1, True),
        ({"verdict": CRASHED, "earlier": [past(20, crashed=False)]}, "restart", 0, False),  # lost with its node
        ({"verdict": CRASHED, "earlier": [past(10), past(15)]}, "leave", 1, True),
    ],
)
def test_what_comes_next(situation, action, code, for_good):
    after = decide(Situation(**situation), Budget(restarts=2, requeues=5))
    assert (after.action, after.exit_code, after.for_good) == (action, code, for_good), after.why
    assert after.why


def test_reasons_name_the_limit():
    assert "budget of 5 requeues" in decide(Situation(STOPPED, requeues=5), Budget(2, 5)).why
    assert "failed 3 times at step 20" in decide(Situation(CRASHED, [past(20), past(20)]), Budget(9, 5, 3)).why
    assert "last job of the chain" in decide(Situation(STOPPED, can_requeue=False), Budget()).why


def test_attempts_are_remembered_by_submission(tmp_path):
    for attempt, submission in ((1, "a"), (2, "b"), (3, "b"), (4, "b")):
        begin_attempt(tmp_path, attempt, Command(("srun",), {}), {"submission": submission})
    end_attempt(tmp_path, 2, CRASHED, {"crashed": True})
    end_attempt(tmp_path, 3, STOPPED, {})
    found = past_attempts(tmp_path, "b")
    assert [(p.attempt, p.outcome, p.crashed, p.lost) for p in found] == [
        (2, "failed", True, False),
        (3, "stopped", False, False),
        (4, "failed", False, True),
    ]


def test_a_run_has_begun_when_rank_0_says_so(tmp_path):
    begin_attempt(tmp_path, 2, Command((), {}))
    assert not has_begun(tmp_path, 2)
    write_status(tmp_path, Status("running", 0, 5, attempt=2))
    assert has_begun(tmp_path, 2)
    assert not has_begun(tmp_path, 3)
    end_attempt(tmp_path, 2, STOPPED, {})
    assert read_status(tmp_path).outcome == "stopped", "where the ranks have not said it themselves"


def test_the_first_death_of_all_nodes_counts(tmp_path):
    for node, (rank, code, when) in enumerate([(1, 1, 20.0), (3, -9, 10.0)]):
        folder = tmp_path / f"torchrun/node-{node}"
        folder.mkdir(parents=True)
        failure = {"rank": rank, "exitcode": code, "pid": 1, "timestamp": when}
        (folder / "failures.json").write_text(json.dumps({"failures": [failure], "text": ""}))
    assert first_death(tmp_path) == "rank 3 died of SIGKILL"


def report(**changed):
    problems = [{"kind": "devices", "text": text} for text in changed.pop("problems", [])]
    return {"problems": problems, "versions": {**versions(), **changed}, "time": 100.0}


def test_bad_nodes_are_named_with_the_reason():
    reports = {
        "n1": report(),
        "n2": report(problems=["7 of 8 GPUs"]),
        "n3": report(torch="1.0"),
        "n4": None,
        "n5": report(),
    }
    bad = bad_nodes(reports)
    assert bad["n2"] == "7 of 8 GPUs"
    assert bad["n3"].startswith("torch 1.0, on most nodes ")
    assert bad["n4"] == "it did not answer"
    assert set(bad) == {"n2", "n3", "n4"}
    assert bad_nodes({"n1": report()}) == {}


def test_where_two_nodes_differ_the_first_is_named():
    bad = bad_nodes({"n1": report(torch="2.14"), "n2": report(torch="2.13")})
    assert bad == {"n2": "torch 2.13, on n1 2.14"}


@pytest.mark.parametrize(
    ("time", "expected"), [(94.0, "6.0 s behind"), (96.0, ""), (112.0, ""), (116.0, "6.0 s ahead")]
)
def test_a_clock_that_is_off_is_a_problem(time, expected):
    """Asked from 100 to 110, by the clock of the one who asked."""
    bad = bad_nodes({"n1": {**report(), "time": time}}, Asked(100.0, 110.0, max_skew_s=5.0))
    assert expected in bad.get("n1", "")
    assert bool(bad) == bool(expected)


@pytest.mark.parametrize(
    ("bad", "excluded", "nodes", "expected"),
    [
        (["n1"], [], ["n1"], False),
        (["n1"], ["n2"], ["n1"], False),
        (["n1"], ["n2", "n3"], ["n1"], True),  # one after the other: it is not the nodes
        (["n1", "n2"], [], ["n1", "n2"], True),
        (["n1"], [], ["n1", "n2"], False),
        (["n1", "n2", "n3"], [], [f"n{i}" for i in range(8)], False),
    ],
)
def test_when_it_is_not_the_nodes(bad, excluded, nodes, expected):
    assert too_many(dict.fromkeys(bad, "x"), excluded, nodes) is expected


def test_a_node_looks_at_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'GPU 0: H100'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    checks = ["--command", "true", "--command", "echo no >&2; exit 3"]
    main([str(tmp_path), str(run_folder), "--gpus", "2", "--disk-gib", "1e9", "--shm-gib", "0", *checks])
    found = json.loads((tmp_path / "n7.json").read_text())
    assert found["problems"][0] == {"kind": "devices", "text": "1 of 2 GPUs"}, "one has fallen off the bus"
    assert "1e+09 wanted" in found["problems"][1]["text"]
    assert found["problems"][-1]["text"] == "`echo no >&2; exit 3` ended with 3 (no)"
    assert found["versions"]["python"]
    assert count_devices({"CUDA_VISIBLE_DEVICES": "0", "PATH": os.environ["PATH"]}) == 1


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    main([str(tmp_path), str(tmp_path / "none"), "--gpus", "0", "--disk-gib", "0", "--shm-gib", "0"])
    (written,) = tmp_path.glob("*.json")
    assert "cannot be written" in json.loads(written.read_text())["problems"][-1]["text"]


def test_grids_expand_and_name_their_runs():
    cells = expand_grid(["engine.lr=1e-3,3e-4", "shards.mix=[1,2],[3]"])
    assert [cell.suffix for cell in cells] == [
        "-lr-1e-3-mix-1_2",
        "-lr-1e-3-mix-3",
        "-lr-3e-4-mix-1_2",
        "-lr-3e-4-mix-3",
    ]
    assert cells[0].overrides == ("engine.lr=1e-3", "shards.mix=[1,2]")
    assert [cell.suffix for cell in expand_grid(["a.k=1", "b.k=2"])] == ["-a_k-1-b_k-2"]
    assert [(cell.suffix, cell.overrides) for cell in expand_grid([])] == [("", ())]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["lr=1"], "expected key=value"),
        (["engine.lr=1,"], "expected key=value"),
        (["engine.lr=1,1"], "one name"),
        (["engine.lr=1", "engine.lr=2"], "twice"),
        ([f"run.seed={','.join(map(str, range(1001)))}"], "1001 runs"),
    ],
)
def test_wrong_grids_are_told(grid, message):
    with pytest.raises(ConfigError, match=message):
        expand_grid(grid)


def test_what_slurm_says_is_read():
    facts = parse_job(
        "JobId=7 JobName=a b UserId=root(0) JobState=RUNNING Requeue=1 ExcNodeList=(null) NodeList=n[1-2] "
        "EndTime=2026-01-02T03:04:05 PreemptTime=None MinMemoryNode=0\nnext=line"
    )
    assert (facts["JobState"], facts["NodeList"], facts["UserId"]) == ("RUNNING", "n[1-2]", "root(0)")
    assert not {"ExcNodeList", "PreemptTime", "next"} & set(facts)
    assert time.strftime("%H:%M", time.localtime(end_time(facts))) == "03:04"
    assert end_time({}) is None


def test_locks_that_a_killed_compiler_left_are_removed(tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    clear_stale_locks(tmp_path)
    clear_stale_locks(tmp_path / "none")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["cpu_adam.so"]


def test_a_port_in_use_is_passed_over():
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        first = 21000
        assert free_port(first) >= first
    with socket.socket() as taken:
        taken.bind(("", free_port(21500)))
        taken.listen()
        assert free_port(taken.getsockname()[1]) == taken.getsockname()[1] + 1
