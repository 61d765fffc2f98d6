"""A run that lost its disk goes on from the mirror, as if nothing had happened."""

import json
import shutil

import pytest
from ranks import RankError, run_ranks
from tiny_run import make_data, train, write_config

from trichord.checkpoints.manifest import step_folders
from trichord.core.status import read_status
from trichord.tracking.metrics import read_events, read_metrics

pytestmark = pytest.mark.distributed


def losses(folder):
    return {row["step"]: row["train/loss"] for row in read_metrics(folder) if row["step"] > 20}


def test_a_run_goes_on_from_the_mirror_on_an_empty_disk(tmp_path):
    data = make_data(tmp_path)
    mirror = f"checkpoints.mirror={tmp_path / 'mirror'}"
    rules = ("checkpoints.keep_last=1", "checkpoints.keep_best={metric: train/loss, mode: max}")

    def go(root: str, *overrides: str):
        config = write_config(data, tmp_path / root)
        assert run_ranks(1, train, str(config), mirror, *rules, *overrides) == [0]
        return tmp_path / root / "tiny"

    here = go("here", "run.max_steps=20")
    copies = tmp_path / "mirror" / "tiny"
    assert {event["step"] for event in read_events(here) if event["kind"] == "mirror"} >= {20}
    assert list(step_folders(copies)) == list(step_folders(here / "checkpoints"))
    assert 20 in step_folders(copies)
    shutil.copytree(copies, tmp_path / "other mirror" / "tiny")
    go("here", f"checkpoints.mirror={tmp_path / 'nowhere'}")  # on to 30, from its own folder

    there = go("there", f"checkpoints.mirror={tmp_path / 'other mirror'}")
    assert read_status(there).outcome == "finished"
    starts = [event["kind_of_start"] for event in read_events(there) if event["kind"] == "start"]
    assert starts == ["resume"]
    assert losses(there) == losses(here)
    assert set(losses(there)) == set(range(21, 31))
    digests = {
        json.loads((f / "checkpoints/step-000030/manifest.json").read_text())["data_digest"] for f in (here, there)
    }
    assert len(digests) == 1

    with pytest.raises(RankError, match=r"holds checkpoints of a run of this name and run\.resume is never"):
        go("third", "run.resume=never")
