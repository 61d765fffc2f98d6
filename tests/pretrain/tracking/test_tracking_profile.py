"""The profiler's window: traces of just these steps, and nothing before, after or without it."""

import gzip
import json

import pytest
import torch
from pydantic import ValidationError

from trichord.tracking.config import ProfileConfig
from trichord.tracking.profile import StepProfiler


def take_steps(profiler, steps) -> list:
    """What `begin` returned, step by step."""
    returned = []
    for step in steps:
        returned.append(profiler.begin(step))
        torch.ones(4, 4) @ torch.ones(4, 4)
    return returned


def names(path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def test_a_trace_of_just_these_steps(tmp_path):
    profiler = StepProfiler(ProfileConfig(start_step=2, steps=2), tmp_path / "profile", rank=3, attempt=1)
    returned = take_steps(profiler, range(6))
    path = tmp_path / "profile" / "step-000002-attempt-1-rank-00003.json.gz"
    assert returned == [None, None, None, None, path, None]
    assert list((tmp_path / "profile").iterdir()) == [path]
    found = names(path)
    assert {name for name in found if name.startswith("step ")} == {"step 3", "step 4"}
    assert found.count("aten::mm") == 2
    assert profiler.close() is None


def test_a_window_beyond_the_end_is_told(tmp_path, caplog):
    profiler = StepProfiler(ProfileConfig(start_step=90, steps=1), tmp_path, rank=0, attempt=1)
    take_steps(profiler, range(3))
    assert profiler.close() is None
    assert "tracking.profile.start_step is 90, and no step began there" in caplog.text


def test_the_end_of_the_run_ends_the_window(tmp_path):
    profiler = StepProfiler(ProfileConfig(start_step=1, steps=50), tmp_path, rank=0, attempt=2)
    take_steps(profiler, range(3))
    found = names(profiler.close())
    assert {name for name in found if name.startswith("step ")} == {"step 2", "step 3"}


def test_a_resume_inside_the_window_takes_the_rest_and_one_behind_it_nothing(tmp_path):
    take_steps(profiler := StepProfiler(ProfileConfig(start_step=2, steps=4), tmp_path, rank=0, attempt=2), [4, 5, 6])
    assert profiler.close() is None, "written when step 6 began"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004-attempt-2-rank-00000.json.gz"]
    behind = StepProfiler(ProfileConfig(start_step=2, steps=4), tmp_path / "none", rank=0, attempt=3)
    assert take_steps(behind, [6, 7]) == [None, None]
    assert not (tmp_path / "none").exists()


def test_outside_the_window_torch_profiler_is_never_made(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("made outside the window")

    monkeypatch.setattr("torch.profiler.profile", refuse)
    monkeypatch.setattr("torch.profiler.record_function", refuse)
    for config in (None, ProfileConfig(start_step=100, steps=1)):
        profiler = StepProfiler(config, tmp_path / "profile", rank=0, attempt=1)
        assert take_steps(profiler, range(5)) == [None] * 5
        assert profiler.close() is None
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_told(tmp_path, log_lines):
    (tmp_path / "profile").write_text("a file where the folder goes")
    profiler = StepProfiler(ProfileConfig(start_step=0, steps=1), tmp_path / "profile", rank=0, attempt=1)
    assert take_steps(profiler, range(3)) == [None, None, None]
    assert "could not be written" in log_lines()[0]


def test_the_window_is_bounded():
    with pytest.raises(ValidationError):
        ProfileConfig(steps=1000)
