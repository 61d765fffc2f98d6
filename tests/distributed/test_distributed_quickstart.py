"""`trichord quickstart --prove`, short: the whole road with real processes, and what it claims of resuming."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 60


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "trichord.cli", "quickstart", "--prove", "--steps", str(STEPS)]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=290, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


def result(folder):
    return json.loads((folder / "runs/quickstart/result.json").read_text())


def test_digests_of_the_data_are_equal_on_every_split(walked):
    digests = result(walked[0])["digests"]
    assert digests["undisturbed"] == digests["resumed"] == digests["resumed_same_split"]


def test_the_same_split_goes_on_bit_for_bit(walked):
    losses = result(walked[0])["losses"]
    assert len(losses["undisturbed"]) >= 10
    assert losses["resumed_same_split"] == losses["undisturbed"]


def test_another_split_stays_within_1e_5(walked):
    losses = result(walked[0])["losses"]
    assert losses["resumed_other_split"] == pytest.approx(losses["undisturbed"], rel=1e-5)


def test_the_result_says_what_each_figure_is_worth(walked):
    metrics = result(walked[0])["metrics"]
    assert {"value", "chance", "baseline", "held_out"} <= set(next(iter(metrics.values())))
    assert metrics["retrieval/image-text/R@1 (scans-heldout)"]["held_out"] is True
    assert metrics["retrieval/audio-text/R@1 (speech-known)"]["held_out"] is False
    assert 0.9 < metrics["caption/image/exact_match (scans-heldout)"]["baseline"] < 1, "a regression on the pixels"


def test_the_road_leaves_an_export_a_report_and_a_table(walked):
    folder, output = walked
    run = folder / "runs/quickstart"
    assert (run / "export/model.safetensors").stat().st_size > 10_000
    assert "<svg" in (run / "report.html").read_text()
    assert "retrieval/image-text/R@1" in output
    assert len(result(folder)["captions"]) == 8
    assert set(result(folder)["seconds"]) >= {"data", "train", "resume", "evaluate", "export", "caption", "report"}


def test_a_second_walk_is_refused_and_nothing_is_lost(walked):
    folder, _ = walked
    before = (folder / "runs/quickstart/result.json").read_bytes()
    command = [sys.executable, "-m", "trichord.cli", "quickstart"]
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2
    assert "remove it" in again.stderr
    assert "Traceback" not in again.stderr
    assert (folder / "runs/quickstart/result.json").read_bytes() == before
