"""The verdict on an attempt comes from the status files alone; restarts stop where they cannot help."""

import json

import pytest

from trichord.core.status import Status, write_rank_status, write_status
from trichord_launch.verdict import Verdict, first_death, judge, last_metrics, why_not_restart


def failed(step, code=1):
    return Verdict("failed", code, step, "")


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("stopped", 75)])
def test_rank_0_speaks_for_a_run_that_ended_well(tmp_path, outcome, code):
    write_status(tmp_path, Status(outcome, code, 40, "why"))
    write_rank_status(tmp_path, 1, Status("failed", 1, 40, "tripped on the way out"))
    verdict = judge(tmp_path)
    assert (verdict.outcome, verdict.exit_code, verdict.step) == (outcome, code, 40)


def test_the_rank_that_knows_is_believed_before_the_ones_that_lost_it(tmp_path):
    write_status(tmp_path, Status("failed", 1, 11, "rank 3 has shown no sign of life"))
    write_rank_status(tmp_path, 0, Status("failed", 1, 11, "rank 3 has shown no sign of life"))
    write_rank_status(tmp_path, 3, Status("failed", 3, 12, "shard a.tar cannot be read"))
    verdict = judge(tmp_path)
    assert (verdict.exit_code, verdict.step, verdict.reason) == (3, 12, "rank 3: shard a.tar cannot be read")
    assert set(verdict.ranks) == {0, 3}


def test_ranks_that_died_without_a_word_failed_where_the_metrics_end(tmp_path):
    write_status(tmp_path, Status("running", 0, 5))
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "time": 1.0}\n{"step": 20, "time": 2.0}\n{"step": 3')
    verdict = judge(tmp_path)
    assert (verdict.outcome, verdict.exit_code, verdict.step) == ("failed", 1, 20)


def test_the_rank_that_was_killed_is_named_beside_those_that_lost_it(tmp_path):
    record = tmp_path / "attempts" / "1"
    (record / "torchrun").mkdir(parents=True)
    assert first_death(record) == ""
    failures = [{"rank": 1, "exitcode": -9, "pid": 10}, {"rank": 0, "exitcode": 1, "pid": 9}]
    (record / "torchrun" / "failures.json").write_text(json.dumps({"failures": failures}))
    assert judge(tmp_path, died=first_death(record)).reason == "rank 1 died of SIGKILL"
    write_rank_status(tmp_path, 0, Status("failed", 1, 11, "lost rank 1"))
    assert judge(tmp_path, died=first_death(record)).reason == "rank 1 died of SIGKILL; rank 0: lost rank 1"
    write_rank_status(tmp_path, 2, Status("failed", 3, 11, "bad shard"))
    assert judge(tmp_path, died=first_death(record)).reason == "rank 2: bad shard"
    failures[0]["exitcode"] = 1
    (record / "torchrun" / "failures.json").write_text(json.dumps({"failures": failures}))
    assert first_death(record) == ""


def test_nothing_at_all_is_a_failure(tmp_path):
    assert judge(tmp_path).outcome == "failed"
    assert judge(tmp_path).step == -1
    (tmp_path / "status.json").write_text("not ours")
    assert "status.json" in judge(tmp_path).reason


def test_interrupted_without_a_checkpoint_is_no_75(tmp_path):
    write_status(tmp_path, Status("running", 0, -1, "starting"))
    assert judge(tmp_path, signal_number=15).exit_code == 143


@pytest.mark.parametrize(
    ("verdict", "earlier", "budget", "interrupted", "expected"),
    [
        (failed(10), [], 2, False, None),
        (failed(12), [failed(10)], 2, False, None),
        (failed(10), [failed(10)], 2, False, "twice at step 10"),
        (failed(10), [failed(10), failed(12)], 5, False, "twice at step 10"),
        (failed(14), [failed(10), failed(12)], 2, False, "budget of 2"),
        (failed(10), [], 0, False, "no restarts"),
        (failed(10, 2), [], 2, False, "exit code 2"),
        (failed(10, 3), [], 2, False, "exit code 3"),
        (failed(10, 4), [], 2, False, "exit code 4"),
        (failed(10), [], 2, True, "asked to stop"),
    ],
)
def test_restarts(verdict, earlier, budget, interrupted, expected):
    why = why_not_restart(verdict, earlier, budget, interrupted)
    assert (why is None) if expected is None else (expected in why)


def test_the_last_metrics_of_a_long_file_are_found_without_reading_it(tmp_path):
    lines = [f'{{"step": {step}, "time": 0.0, "train/loss": 1.0}}' for step in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert last_metrics(tmp_path)["step"] == 4999
