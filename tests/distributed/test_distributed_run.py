"""Runs that are stopped, killed and resumed: real processes, real tars, real signals."""

import json
import os
import shutil
import signal
import time

import pytest
from ranks import RankError, Ranks, run_ranks
from tiny_run import make_data, slow_train, train, wait_until, write_config

from trichord.checkpoints.load import find_latest
from trichord.core.status import read_rank_statuses, read_status
from trichord.tracking.metrics import read_events, read_metrics

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """30 steps on 2 ranks, ZeRO-2, nobody interferes."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(2, train, str(write_config(data, root))) == [0, 0]
    return root / "tiny"


def losses(folder):
    return {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}


def digest(folder):
    return json.loads((find_latest(folder / "checkpoints") / "manifest.json").read_text())["data_digest"]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The same run; rank 1 is killed with -9 between the checkpoints of steps 10 and 20."""
    root = tmp_path_factory.mktemp("killed")
    folder = root / "tiny"
    ranks = Ranks(2, slow_train, str(write_config(data, root)))
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 13)
    os.kill(ranks.pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    results, failures = ranks.wait(60)
    return folder, results, failures, time.monotonic() - killed_at


def test_survivors_of_a_kill_leave_soon_without_saving(killed):
    folder, results, failures, seconds = killed
    assert results == {}
    assert failures[1] == "exit -9"
    assert seconds < 30
    assert find_latest(folder / "checkpoints").name == "step-000010"
    status = read_status(folder)
    assert (status.outcome, status.exit_code) == ("failed", 1)
    assert 0 in read_rank_statuses(folder)


def resume(killed_folder, root, data, world_size, *overrides):
    shutil.copytree(killed_folder, root / "tiny")
    assert run_ranks(world_size, train, str(write_config(data, root)), *overrides) == [0] * world_size
    return root / "tiny"


def test_resume_on_the_same_split_is_bit_for_bit(killed, undisturbed, data, tmp_path):
    folder = resume(killed[0], tmp_path, data, 2)
    assert losses(folder) == losses(undisturbed)
    assert digest(folder) == digest(undisturbed)
    assert (folder / "metrics.discarded.jsonl").exists(), "steps after the checkpoint were logged, then lost"


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["engine.zero_stage=0", "batches.micro_rows=2", "batches.num_workers=1"]),
        pytest.param(3, ["engine.zero_stage=3", "batches.num_workers=2"], marks=pytest.mark.slow),
    ],
)
def test_resume_on_another_split_goes_on_with_the_next_sample(
    killed, undisturbed, data, tmp_path, world_size, overrides
):
    folder = resume(killed[0], tmp_path, data, world_size, *overrides)
    assert digest(folder) == digest(undisturbed)
    ours, theirs = losses(folder), losses(undisturbed)
    for step in range(11, 31):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step


def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(undisturbed, data, tmp_path):
    config = write_config(data, tmp_path)
    folder = tmp_path / "tiny"
    ranks = Ranks(2, slow_train, str(config))
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 3)
    os.kill(ranks.pids[1], signal.SIGUSR1)
    results, failures = ranks.wait(60)
    assert (results, failures) == ({0: 75, 1: 75}, {})
    status = read_status(folder)
    assert (status.outcome, status.exit_code) == ("stopped", 75)
    assert find_latest(folder / "checkpoints").name == f"step-{status.step:06d}"
    assert read_metrics(folder)[-1]["step"] == status.step, "no step after the agreed one"
    assert run_ranks(2, train, str(config)) == [0, 0]
    assert losses(folder) == losses(undisturbed)
    assert read_status(folder).outcome == "finished"
    assert [event["kind"] for event in read_events(folder)].count("start") == 2
    ends = [event for event in read_events(folder) if event["kind"] == "end"]
    assert [(end["finished"], end["signal"]) for end in ends] == [(False, "a signal on rank 1"), (True, None)]


def test_training_a_finished_run_again_changes_nothing(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train, str(write_config(data, tmp_path))) == [0]
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == before
    assert read_status(tmp_path / "tiny").outcome == "finished"


def test_changed_bytes_in_a_checkpoint_are_noticed_and_nothing_is_overwritten(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    config = write_config(data, tmp_path)
    newest = find_latest(tmp_path / "tiny" / "checkpoints")
    for name in ("rank-00000.safetensors", "loader.json"):
        whole = (newest / name).read_bytes()
        middle = len(whole) // 2
        (newest / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(RankError, match="its bytes have changed"):
            run_ranks(1, train, str(config), "run.max_steps=32")
        (newest / name).write_bytes(whole)
    assert run_ranks(1, train, str(config), "run.max_steps=32") == [0]


def test_checkpoints_without_manifests_are_no_reason_to_start_again(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    for manifest in (tmp_path / "tiny" / "checkpoints").glob("step-*/manifest.json"):
        manifest.unlink()
    before = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    with pytest.raises(RankError, match=r"none of the .* checkpoints there is complete"):
        run_ranks(1, train, str(write_config(data, tmp_path)))
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_moved_aside_by_a_dying_save_gets_its_name_back(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    newest = find_latest(tmp_path / "tiny" / "checkpoints")
    newest.rename(newest.with_name(f"{newest.name}.replaced-x"))
    assert run_ranks(1, train, str(write_config(data, tmp_path))) == [0]
    assert newest.is_dir()
    assert read_status(tmp_path / "tiny").step == 30


def test_a_second_process_on_a_run_folder_is_refused(data, tmp_path):
    config = str(write_config(data, tmp_path))
    first = Ranks(1, slow_train, config)
    wait_until(lambda: (tmp_path / "tiny" / "metrics.jsonl").exists())
    with pytest.raises(RankError, match="is being trained by another process"):
        run_ranks(1, train, config)
    os.kill(first.pids[0], signal.SIGHUP)  # a terminal that is closed
    assert first.wait(60) == ({0: 75}, {})
    assert read_status(tmp_path / "tiny").reason == "stopped by SIGHUP with a checkpoint"
