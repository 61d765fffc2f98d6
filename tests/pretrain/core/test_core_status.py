"""The status files: atomic, complete, and refused when they are not ours."""

import json
import os
import threading

import pytest

from trichord.core import status as status_module
from trichord.core.errors import TrichordError
from trichord.core.status import (
    Status,
    clear_rank_statuses,
    current_attempt,
    read_rank_statuses,
    read_status,
    write_rank_status,
    write_status,
)


def test_a_status_comes_back_as_it_was_written(tmp_path):
    assert read_status(tmp_path / "run") is None
    write_status(tmp_path / "run", Status("stopped", 75, 12, reason="SIGTERM", attempt=3, time=1.5))
    assert read_status(tmp_path / "run") == Status("stopped", 75, 12, reason="SIGTERM", attempt=3, time=1.5)
    write_status(tmp_path / "run", Status("finished", 0, 20))
    assert read_status(tmp_path / "run").time > 1e9, "the time of writing is filled in"


def test_rank_statuses_are_listed_by_rank_and_cleared(tmp_path):
    for rank in (10, 2):
        write_rank_status(tmp_path, rank, Status("failed", 3, 7, reason=f"rank {rank}"))
    write_status(tmp_path, Status("running", 0, 6))
    assert list(read_rank_statuses(tmp_path)) == [2, 10]
    clear_rank_statuses(tmp_path)
    assert read_rank_statuses(tmp_path) == {}
    assert read_status(tmp_path).outcome == "running", "the run's own status stays"


def test_a_crash_before_the_rename_leaves_the_old_status_and_no_litter(tmp_path, monkeypatch):
    write_status(tmp_path, Status("running", 0, 1))

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_status(tmp_path, Status("finished", 0, 2))
    monkeypatch.undo()
    assert read_status(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_readers_never_see_a_part(tmp_path):
    write_status(tmp_path, Status("running", 0, 0))
    stop = threading.Event()

    def keep_writing():
        step = 0
        while not stop.is_set():
            step += 1
            write_status(tmp_path, Status("running", 0, step, reason="x" * 20_000))

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(200):
            assert read_status(tmp_path).outcome == "running"
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("text", ["", "[]", '{"outcome": "finished"', '{"outcome": "fine", "exit_code": 0, "step": 1}'])
def test_a_file_that_is_no_status_is_named(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(TrichordError, match=r"status\.json"):
        read_status(tmp_path)


def test_unknown_outcomes_are_refused_and_unknown_keys_ignored(tmp_path):
    with pytest.raises(ValueError, match="'done'"):
        write_status(tmp_path, Status("done", 0, 1))  # pyright: ignore
    write_status(tmp_path, Status("finished", 0, 1))
    newer = json.loads((tmp_path / "status.json").read_text()) | {"host": "n1"}
    (tmp_path / "status.json").write_text(json.dumps(newer))
    assert read_status(tmp_path).step == 1


def test_the_attempt_comes_from_the_launcher(monkeypatch):
    monkeypatch.delenv("TRICHORD_ATTEMPT", raising=False)
    assert current_attempt() == 0
    monkeypatch.setenv("TRICHORD_ATTEMPT", "4")
    assert current_attempt() == 4


def test_the_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(status_module.os, "fsync", lambda descriptor: calls.append("fsync"))
    real_replace = os.replace
    monkeypatch.setattr(status_module.os, "replace", lambda a, b: (calls.append("rename"), real_replace(a, b)))
    write_status(tmp_path, Status("finished", 0, 1))
    assert calls == ["fsync", "rename", "fsync"]
