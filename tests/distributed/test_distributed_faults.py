"""Faults planted in real runs: what the run says, in which files, and what it leaves with. docs/guides/faults.md is the
same table for users."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from plants import may_mount, train_planted
from ranks import Ranks
from tiny_run import make_data, wait_until, write_config

from trichord.checkpoints.load import find_latest
from trichord.core.status import read_rank_statuses, read_status
from trichord.shards.index import index_shards
from trichord.tracking.metrics import read_events, read_metrics

pytestmark = pytest.mark.distributed

LEAVE_WITHIN_S = 30
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return indexed(make_data(tmp_path_factory.mktemp("data")))


def indexed(folder):
    index_shards([str(path) for path in sorted(folder.glob("it-*.tar"))], 1)  # once, not in each run
    return folder


def small_config(data, root):
    """The tiny run of the other tests with images and text only, one objective, 6 steps, a checkpoint every second."""
    path = write_config(data, root)
    config = yaml.safe_load(path.read_text())
    config["run"]["max_steps"] = STEPS
    config["shards"]["sources"] = config["shards"]["sources"][:1]
    config["encoders"] |= {"text": None, "audio": None}
    config["objectives"] = {"next_token": {}}
    config["checkpoints"] = {"save_every_steps": 2}
    config["engine"] |= {"heartbeat_timeout_s": 5, "timeout_s": 60}
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Ended:
    """A run that is over. codes: what each rank left with, -9 and the like for a signal."""

    folder: Path
    codes: dict

    def log(self, rank):
        return (self.folder / "logs" / f"rank-{rank:05d}.log").read_text()

    def stderr(self, rank):
        return (self.folder.parent / f"stderr-{rank}").read_text()

    def events(self, kind):
        return [event for event in read_events(self.folder) if event["kind"] == kind]


def code_of(text):
    if found := re.fullmatch(r"exit (-?\d+)", text):
        return int(found[1])
    return 1 if text.startswith("Traceback") else text  # as python leaves after an exception


def end_of(ranks, folder, timeout_s=90):
    results, failures = ranks.wait(timeout_s)
    codes = {**results, **{rank: code_of(text) for rank, text in failures.items()}}
    ended = Ended(folder, dict(sorted(codes.items())))
    for rank in ended.codes:
        print(f"--- rank {rank}: {failures.get(rank, '')}\n{ended.stderr(rank)}")  # pytest shows it if the test fails
    return ended


def run_with(data, root, world_size, plant, facts, *overrides):
    """A whole run with a plant."""
    config = small_config(data, root)
    ranks = Ranks(world_size, train_planted, plant, facts, str(config), list(overrides))
    return end_of(ranks, root / "tiny")


def check_end(ended, code, reason, rank=0):
    """The run's status, the rank's own, the event, and the last message of its log say why."""
    status = read_status(ended.folder)
    assert (status.outcome, status.exit_code) == ("failed", code)
    assert re.search(reason, status.reason), status.reason
    own = read_rank_statuses(ended.folder)[rank]
    assert (own.outcome, own.exit_code) == ("failed", code)
    assert re.search(reason, own.reason), own.reason
    (event,) = ended.events("fault")
    assert event["code"] == code
    assert re.search(reason, event["reason"]), event["reason"]
    last = ended.log(rank).rpartition("leaving without saving:")[2]
    assert re.search(reason, last), ended.log(rank)[-2000:]


# A step that does not end.


def test_a_rank_that_hangs_is_named_with_its_phase_and_its_stack(data, tmp_path):
    ended = run_with(data, tmp_path, 2, "hang", {"rank": 1, "step": 2}, "engine.stuck_after_s=8")
    assert ended.codes == {0: 1, 1: 1}
    reason = r"step 3 has not moved for \d+ s: rank 1 is in forward, micro step 0, .*holding text.* entered \d+ coll"
    check_end(ended, 1, reason, rank=0)
    check_end(ended, 1, reason, rank=1)
    assert "in act" not in ended.log(0)
    assert re.search(r'File ".*plants.py", line \d+ in <lambda>', ended.log(1)), "the stack of what hangs"
    (event,) = ended.events("fault")
    assert event["stuck"] == [1]
    assert [line.partition(":")[0] for line in event["ranks"]] == ["ranks 0", "ranks 1"]
    (slow,) = ended.events("slow")
    assert "rank 1 is in forward" in slow["reason"]
    assert slow["time"] < event["time"]


def test_a_data_worker_that_hangs_is_named_with_the_member_it_decodes(data, tmp_path):
    overrides = ("engine.stuck_after_s=8", "batches.num_workers=1")
    ended = run_with(data, tmp_path, 2, "worker_hangs", {"rank": 1, "calls": 6}, *overrides)
    assert ended.codes == {0: 1, 1: 1}
    check_end(ended, 1, r"rank 1 is in data wait \(worker 0: decode, shard .*it-\d+.tar, member it\d+.png, for", rank=1)
    assert re.search(r'File ".*plants.py", line \d+ in <lambda>', ended.log(1)), "the worker's own stack"


def test_one_process_alone_says_what_it_is_stuck_in(data, tmp_path):
    ended = run_with(data, tmp_path, 1, "hang", {"rank": 0, "step": 2}, "engine.stuck_after_s=6")
    assert ended.codes == {0: 1}
    check_end(ended, 1, r"step 3 has not moved for \d+ s: forward, micro step 0")


# A rank that is gone.


def test_a_killed_rank_is_named_and_the_others_leave_without_saving(data, tmp_path):
    ended = run_with(data, tmp_path, 2, "kill", {"rank": 1, "step": 3})
    assert ended.codes == {0: 1, 1: -9}
    check_end(ended, 1, r"rank 1 has shown no sign of life for \d+ s; at its last one it was in \w+")
    assert ended.events("fault")[0]["time"] - read_metrics(ended.folder)[-1]["time"] < LEAVE_WITHIN_S
    assert find_latest(ended.folder / "checkpoints").name == "step-000002"


def test_where_rank_0_is_the_dead_one_another_writes_for_the_run(data, tmp_path):
    """It also holds the job's store here, as the node of rank 0 does."""
    ended = run_with(data, tmp_path, 2, "kill", {"rank": 0, "step": 3})
    assert ended.codes == {0: -9, 1: 1}
    check_end(ended, 1, r"the job's store does not answer any more \(\w+\): its host process died", rank=1)
    assert ended.events("fault")[0]["noticed_by"] == 1


def test_a_bug_on_one_rank_reaches_the_others_by_name(data, tmp_path):
    ended = run_with(data, tmp_path, 2, "raise_bug", {"rank": 1, "step": 3})
    assert ended.codes == {0: 1, 1: 1}
    check_end(ended, 1, "ZeroDivisionError: ", rank=1)
    assert "Traceback" in ended.log(1)
    assert read_rank_statuses(ended.folder)[0].reason.startswith("rank 1: ZeroDivisionError")


# Memory.


@pytest.mark.parametrize("plant", ["host_memory", "device_memory"])
def test_out_of_memory_says_where_on_what_and_which_keys_to_lower(data, tmp_path, plant):
    ended = run_with(data, tmp_path, 1, plant, {"rank": 0, "step": 1})
    assert ended.codes == {0: 1}
    where = plant.partition("_")[0]
    check_end(
        ended,
        1,
        rf"out of memory on the {where} in forward, micro step 0, on a micro-batch of 48 tokens \(\d+ in use\), \d+ "
        r"images and \d+ clips: lower batches.micro_rows \(now 1\), set engine.activation_checkpointing "
        r"\(now (none|false)\), raise engine.zero_stage \(now 2\), or set engine.offload \(now none\)",
    )
    assert "Traceback" not in ended.log(0)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (
            "worker_dies",
            r"a process of the loader has died: .*(killed|exited).*worker 0 did: decode, shard .*member i\w+.png",
        ),
        ("worker_memory", r"a process of the loader ran out of host memory \(decode, shard .*member i\w+.png\)"),
    ],
)
def test_a_data_worker_that_dies_says_at_which_sample(data, tmp_path, plant, says):
    ended = run_with(data, tmp_path, 1, plant, {"rank": 0, "calls": 6}, "batches.num_workers=1")
    assert ended.codes == {0: 1}
    check_end(ended, 1, says + r".*lower batches.num_workers or batches.prefetch_steps")


# Disks.


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs root: a file system of its own")


@needs_mounts
def test_a_full_disk_ends_the_run_when_its_record_cannot_be_written(data, tmp_path):
    facts = {"folder": str(tmp_path / "tiny"), "copy": str(tmp_path / "copy"), "step": 3, "leave": 0}
    ended = run_with(data, tmp_path, 1, "full_disk", facts)
    ended.folder = tmp_path / "copy"
    assert ended.codes == {0: 1}
    check_end(ended, 1, r"the record of the run in .* cannot be written: No space left on device; free space there")
    assert read_metrics(ended.folder)[-1]["step"] == 3
    assert find_latest(ended.folder / "checkpoints").name == "step-000002"


@needs_mounts
def test_a_disk_too_full_for_a_checkpoint_costs_that_checkpoint_and_the_last_one_is_missed(data, tmp_path):
    facts = {"folder": str(tmp_path / "tiny"), "copy": str(tmp_path / "copy"), "step": 3, "leave": 40960}
    ended = run_with(data, tmp_path, 1, "full_disk", facts)
    ended.folder = tmp_path / "copy"
    assert ended.codes == {0: 1}
    check_end(ended, 1, r"the last checkpoint \(step 6\) could not be written: .*No space left on device")
    assert {event["checkpoint"] for event in ended.events("checkpoint_failed")} == {4, 6}
    assert read_metrics(ended.folder)[-1]["step"] == STEPS
    assert find_latest(ended.folder / "checkpoints").name == "step-000002"


def test_a_file_that_may_not_grow_ends_the_run_with_one_message(data, tmp_path):
    ended = run_with(data, tmp_path, 1, "file_size", {"step": 3, "limit": 1500}, "checkpoints.save_every_steps=100")
    assert ended.codes == {0: 1}
    check_end(ended, 1, r"the record of the run in .* cannot be written: File too large; free space")


def test_a_log_that_cannot_be_written_does_not_end_the_run(data, tmp_path):
    facts = {"folder": str(tmp_path / "tiny")}
    ended = run_with(data, tmp_path, 1, "log_on_full_disk", facts)
    assert ended.codes == {0: 0}
    assert read_status(ended.folder).outcome == "finished"
    assert ended.stderr(0).count("rank-00000.log cannot be written (No space left on device)") == 1
    assert "Traceback" not in ended.stderr(0)


@needs_mounts
def test_a_read_only_run_folder_is_told_before_anything_is_built(data, tmp_path):
    ended = run_with(data, tmp_path, 2, "read_only", {"folder": str(tmp_path / "tiny")})
    assert ended.codes == {0: 2, 1: 2}
    assert list((tmp_path / "tiny").iterdir()) == []


# Data, checkpoints, signals.


def test_shards_that_vanish_end_the_run_with_the_code_of_data(data, tmp_path):
    (tmp_path / "data").mkdir()
    own = indexed(make_data(tmp_path / "data"))
    facts = {"step": 1, "pattern": f"{own}/*.tar"}
    ended = run_with(own, tmp_path, 2, "shards_vanish", facts, "run.max_steps=200")
    assert ended.codes == {0: 3, 1: 3}
    check_end(ended, 3, r"No such file or directory: .*tar.*check that the shard is there")


def test_a_second_signal_does_not_cost_the_checkpoint(data, tmp_path):
    config = small_config(data, tmp_path)
    ranks = Ranks(1, train_planted, "slow_save", {"seconds": 2.0}, str(config), ["checkpoints.save_every_steps=100"])
    folder = tmp_path / "tiny"
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 2)
    os.kill(ranks.pids[0], signal.SIGUSR1)
    wait_until(lambda: (folder / "data.json").exists())  # written when the save has begun
    os.kill(ranks.pids[0], signal.SIGTERM)
    ended = end_of(ranks, folder)
    assert ended.codes == {0: 75}
    status = read_status(folder)
    assert (status.outcome, status.reason) == ("stopped", "stopped by SIGUSR1 with a checkpoint")
    assert "SIGTERM: stopping already, with a checkpoint" in ended.stderr(0)
    assert find_latest(folder / "checkpoints").name == f"step-{status.step:06d}"


def test_a_signal_while_shards_are_indexed_does_not_wait_for_the_first_step(data, tmp_path):
    ended = run_with(data, tmp_path, 2, "stop_while_indexing", {})
    assert ended.codes == {0: 75, 1: 75}
    status, (event,) = read_status(ended.folder), ended.events("end")
    assert (status.outcome, status.exit_code, status.step) == ("stopped", 75, 0)
    said = "stopped by SIGTERM before the first step, with 1 of 2 shards of it indexed"
    assert status.reason.startswith(said)
    assert (event["finished"], event["reason"]) == (False, status.reason)
    assert said in ended.log(0)
    assert not ended.events("fault")


def test_a_corrupted_checkpoint_is_exit_4_and_stays_as_it_is(data, tmp_path):
    config = small_config(data, tmp_path)
    first = end_of(Ranks(1, train_planted, "nothing", {}, str(config), []), tmp_path / "tiny")
    assert first.codes == {0: 0}
    newest = find_latest(tmp_path / "tiny" / "checkpoints")
    (file,) = newest.glob("rank-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ended = end_of(Ranks(2, train_planted, "nothing", {}, str(config), ["run.max_steps=8"]), tmp_path / "tiny")
    assert ended.codes == {0: 4, 1: 4}
    check_end(ended, 4, rf"{file.name}.*its bytes have changed")
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("step-*"))) == 3


# Steps that are not finite.


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_bad_step_is_skipped_with_its_samples_named_and_the_run_goes_on(data, tmp_path, stage):
    facts = {"rank": 1, "steps": [2]}
    ended = run_with(data, tmp_path, 2, "not_finite", facts, f"engine.zero_stage={stage}", "batches.micro_rows=2")
    assert ended.codes == {0: 0, 1: 0}
    (event,) = ended.events("skipped_step")
    assert event["step"] == 3
    assert event["ranks_with_bad_loss"] == [1]
    assert event["samples"]
    assert all(len(sample) == 3 for sample in event["samples"])
    assert read_status(ended.folder).outcome == "finished"
    norms = {row["step"]: row["train/grad_norm"] for row in read_metrics(ended.folder) if "train/grad_norm" in row}
    assert all(norms[step] == norms[step] for step in (1, 2, 4, 5, 6)), "finite again after the skipped step"


@pytest.mark.parametrize(
    ("stage", "rewinds", "steps", "last", "why", "newest"),
    [
        (0, 0, [2, 3, 4], 4, "", 2),
        (1, 2, [0, 1], 2, ", and there is no checkpoint to go back to", None),
        (2, 1, [2, 3, 4, 5], 6, r", and engine.rewinds \(1\) are used up", 2),
    ],
)
def test_bad_steps_in_a_row_stop_the_run(data, tmp_path, stage, rewinds, steps, last, why, newest):
    overrides = (f"engine.zero_stage={stage}", "engine.max_bad_steps=2", f"engine.rewinds={rewinds}")
    facts = {"rank": 1, "steps": steps}
    ended = run_with(data, tmp_path, 2, "not_finite", facts, *overrides, "batches.micro_rows=2")
    assert ended.codes == {0: 1, 1: 1}
    said = rf"2 steps in a row had a non-finite loss or gradient \(the last is {last}\); the weights are those before"
    check_end(ended, 1, rf"{said} them{why}\. Lower engine.lr")
    assert [event["step"] for event in ended.events("skipped_step")][:2] == [steps[0] + 1, steps[1] + 1]
    found = find_latest(ended.folder / "checkpoints")
    assert (found and found.name) == (newest and f"step-{newest:06d}")


# The same under torchrun, as the launcher starts it.


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "torchrun"])
def test_under_the_launcher_nobody_is_left_and_the_verdict_says_why(data, tmp_path, victim):
    """Ranks go on without torchrun, whose place is only to start and to end them; then the launcher ends them."""
    config, folder = small_config(data, tmp_path), tmp_path / "tiny"
    said = open(tmp_path / "said", "w")  # noqa: SIM115  (closed by the process' end)
    overrides = ["run.max_steps=100000", "checkpoints.save_every_steps=20"]
    command = [sys.executable, "-m", "trichord_launch.cli", "local", str(config), "--procs", "2", *overrides]
    launcher = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        wait_until(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 30, 240)
        torchrun = children_of(launcher.pid)[0]
        ranks = [pid for pid in children_of(torchrun) if b"trichord" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(torchrun if victim == "torchrun" else ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        assert launcher.wait(90) == 1
        assert time.monotonic() - killed < LEAVE_WITHIN_S + 15, "torchrun and the launcher need a few seconds more"
    finally:
        launcher.kill()
        launcher.wait()
    assert not any(map(is_alive, ranks))
    reason = r"rank 1 has shown no sign of life" if victim == "rank" else r"torchrun died of SIGKILL"
    status = read_status(folder)
    assert (status.outcome, status.exit_code) == ("failed", 1)
    assert re.search(reason, status.reason), status.reason
    assert re.search(reason, (tmp_path / "said").read_text())
    if victim == "torchrun":
        return
    (event,) = [event for event in read_events(folder) if event["kind"] == "fault"]
    assert re.search(reason, event["reason"])


def is_alive(pid):
    """Not so a dead one that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
