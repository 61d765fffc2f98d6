"""The record: flushed line by line, cut at the checkpoint on resume, never broken by a crash."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from trichord.tracking.metrics import (
    EventsWriter,
    MetricsWriter,
    merge_steps,
    metric_names,
    read_events,
    read_metrics,
    series,
)


def write_steps(folder, steps, resume_step=None):
    writer = MetricsWriter(folder, resume_step=resume_step)
    for step in steps:
        writer.log(step, {"train/loss": 1.0 / step})
    writer.close()
    return writer


def test_lines_are_readable_while_the_writer_is_open(tmp_path):
    writer = MetricsWriter(tmp_path / "run", resume_step=None)
    writer.log(1, {"train/loss": 2.5, "data/mix_frac/photos": 0.25})
    (row,) = read_metrics(tmp_path / "run")
    assert row["step"] == 1
    assert row["train/loss"] == 2.5
    assert row["time"] > 1e9
    writer.close()


def test_a_killed_writer_loses_nothing(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom trichord.tracking.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]), resume_step=None)\n"
        "for step in range(1, 51): w.log(step, {'train/loss': 1.0})\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 51))


def test_resume_moves_the_lines_past_the_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 11))
    writer = write_steps(tmp_path, range(7, 13), resume_step=6)
    assert writer.discarded == 4
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))
    discarded = [json.loads(line) for line in (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [row["step"] for row in discarded] == [7, 8, 9, 10]


def test_discarded_lines_of_several_attempts_add_up(tmp_path):
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(3, 5), resume_step=2)
    write_steps(tmp_path, range(1, 3), resume_step=None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    lines = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 1, 2, 3, 4]


def test_a_torn_last_line_goes_to_the_discarded_file(tmp_path):
    write_steps(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3], "readers pass over it"
    write_steps(tmp_path, [4], resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "metrics.discarded.jsonl").read_text()) == {"torn": '{"step": 4, "train/lo'}


def test_a_whole_last_line_without_newline_is_kept_apart_from_the_next(tmp_path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, [4], resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_a_crash_while_cutting_loses_no_line(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 5))

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        MetricsWriter(tmp_path, resume_step=2)
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.discarded.jsonl").read_text().splitlines()) == 2


def test_non_finite_values_are_valid_json_and_come_back_as_nan(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    writer.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    writer.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["train/loss"])
    assert math.isnan(row["train/grad_norm"])


@pytest.mark.parametrize("name", ["loss", "train/", "Train/loss", "train/loss (%)", "/loss", "train//loss"])
def test_names_must_have_a_room(tmp_path, name):
    writer = MetricsWriter(tmp_path, resume_step=None)
    with pytest.raises(ValueError, match="room/name_unit"):
        writer.log(1, {name: 1.0})


def test_rows_of_a_step_merge_and_series_follow_one_name(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    writer.log(2, {"train/loss": 2.0, "train/grad_norm": 1.0})
    writer.log(2, {"eval/digits/r_at_1_frac": 0.5})
    writer.log(1, {"train/loss": 3.0})
    writer.close()
    rows = merge_steps(read_metrics(tmp_path))
    assert [row["step"] for row in rows] == [1, 2]
    assert metric_names(rows) == ["train/loss", "train/grad_norm", "eval/digits/r_at_1_frac"]
    assert series(rows, "train/loss") == ([1, 2], [3.0, 2.0])
    assert series(rows, "eval/digits/r_at_1_frac") == ([2], [0.5])


def test_events_stay_over_attempts_and_take_any_fact(tmp_path):
    EventsWriter(tmp_path).log("start", world_size=2, loss=math.nan, folder=tmp_path, names=("a", math.inf))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind": "sa')
    EventsWriter(tmp_path, attempt=1).log("resume", step=6)
    start, resume = read_events(tmp_path)
    assert start == {
        "time": start["time"], "kind": "start", "step": None, "attempt": 0, "world_size": 2, "loss": "nan",
        "folder": str(tmp_path), "names": ["a", "inf"],
    }  # fmt: skip
    assert (resume["kind"], resume["step"], resume["attempt"]) == ("resume", 6, 1)


def test_an_empty_folder_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_events(tmp_path) == []
