"""Followed sources: new shards join at an epoch's border, once for all processes, and the past stays what it was."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import fsspec
import pytest

from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import ShardsConfig
from trichord.shards.follow import FollowLog, ShardFinder
from trichord.shards.lanes import LanePlanner, LaneSource, LaneState
from trichord.shards.reader import SourceTable, open_sources, read_member


@pytest.fixture
def stream(tmp_path, text_shards):
    """stream(name, size): a whole shard of texts appears in tmp_path/stream; returns its path."""
    folder = tmp_path / "stream"
    folder.mkdir()

    def appear(name: str, size: int) -> str:
        (made,) = text_shards([size], f"made-{name}-{size}")
        os.replace(made, folder / name)
        return str(folder / name)

    return appear


def _open(tmp_path, pattern=None, records="records", **options) -> SourceTable:
    shards = pattern or str(tmp_path / "stream" / "*.tar")
    source = {"name": "news", "shards": shards, "follow": True, **options}
    return open_sources(ShardsConfig(sources=[source]), tmp_path / records)[0]  # type: ignore


def _record(tmp_path, epoch: int) -> Path:
    return tmp_path / "records" / "news" / f"epoch-{epoch:06d}.json"


def test_new_shards_join_at_the_border_behind_the_old_ones(tmp_path, stream, caplog):
    caplog.set_level(logging.INFO, logger="trichord")
    stream("m.tar", 3)
    table = _open(tmp_path)
    stream("a.tar", 2)  # sorts before the first, and must not push it
    stream("z.tar", 1)
    assert (table.shards_at(0), table.num_samples) == (1, 3)
    assert (table.shards_at(1), table.num_samples) == (3, 6)
    assert [Path(shard).name for shard in table.shards] == ["m.tar", "a.tar", "z.tar"]
    assert [table.samples_at(epoch) for epoch in (0, 1, 2)] == [3, 6, 6]  # epoch 2: nothing new
    assert [record.message for record in caplog.records if "join" in record.message] == [
        "source news: 2 new shards with 3 samples join at epoch 1"
    ]
    assert read_member(table.entry(3), "text", 9) == b"0"
    assert json.loads(_record(tmp_path, 2).read_text())["added"] == []


def test_a_later_start_sees_the_recorded_past_and_not_what_came_since(tmp_path, stream):
    stream("0.tar", 3)
    table = _open(tmp_path)
    stream("1.tar", 2)
    assert table.shards_at(1) == 2
    digest = table.digest
    stream("2.tar", 9)
    again = _open(tmp_path)
    assert (again.shards_at(0), again.shards_at(1), again.shard_sizes, again.digest) == (1, 2, [3, 2], digest)
    assert again.shards_at(2) == 3
    assert _open(tmp_path, records="other").shard_sizes == [3, 2, 9]  # another run begins with all there is


def test_a_process_that_began_before_the_growth_reads_new_samples(tmp_path, stream):
    """A decoding worker is forked with the table as it was, and is sent samples of a later epoch."""
    stream("0.tar", 3)
    table = _open(tmp_path)
    worker = pickle.loads(pickle.dumps(table))
    stream("1.tar", 2)
    table.shards_at(3)
    assert worker.entry(4) == table.entry(4)
    with pytest.raises(IndexError, match="samples 0 to 4, asked for 5"):
        worker.entry(5)


def test_a_listing_that_is_older_than_a_record_is_made_anew(tmp_path, stream):
    """Between this process' look and its record another one found more, and was first."""
    stream("0.tar", 1)
    slow, quick = _open(tmp_path), _open(tmp_path)
    stream("1.tar", 2)
    look = ShardFinder.look

    def look_and_lose(self, known):
        found = look(self, known)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardFinder, "look", look)
            stream("2.tar", 4)
            quick.shards_at(1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFinder, "look", look_and_lose)
        assert slow.shards_at(1) == 3
    assert slow.shard_sizes == quick.shard_sizes == [1, 2, 4]


def test_the_first_to_record_an_epoch_decides_for_all(tmp_path, stream):
    stream("0.tar", 1)
    first, second = _open(tmp_path), _open(tmp_path)
    log, known = FollowLog(tmp_path / "records", "news"), list(first._headers)
    stream("1.tar", 2)
    assert first.shards_at(1) == 2
    before = _record(tmp_path, 1).read_bytes()
    stream("2.tar", 4)
    assert log.record(1, known, []) == log.read(1, known)  # came second, with another list
    assert _record(tmp_path, 1).read_bytes() == before
    assert (second.shards_at(1), second.shard_sizes) == (2, [1, 2])
    assert not list((tmp_path / "records" / "news").glob(".*"))


def _race(tmp_path, number, start, results):
    table = _open(tmp_path)
    start.wait()
    seen = []
    for epoch in range(1, 6):
        made = tmp_path / "made" / f"{number}-{epoch}.tar"
        os.replace(made, tmp_path / "stream" / made.name)
        seen.append(table.shards_at(epoch))
    results.put((seen, [Path(shard).name for shard in table.shards]))


def test_processes_that_race_agree(tmp_path, stream, text_shards):
    """Each adds a shard and asks for the next epoch, so that their lists differ; one record stands per epoch."""
    stream("0.tar", 1)
    (tmp_path / "made").mkdir()
    for number in range(3):
        for epoch in range(1, 6):
            (made,) = text_shards([1 + number], "one")
            os.replace(made, tmp_path / "made" / f"{number}-{epoch}.tar")
    _open(tmp_path)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, n, start, results)) for n in range(3)]
    for racer in racers:
        racer.start()
    seen = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert seen[0] == seen[1] == seen[2]
    assert _open(tmp_path).shards_at(5) == seen[0][0][-1]


def test_a_shard_that_is_gone_is_named(tmp_path, stream):
    stream("0.tar", 1)
    stream("1.tar", 1)
    table = _open(tmp_path)
    os.unlink(tmp_path / "stream" / "1.tar")
    with pytest.raises(
        DataError, match=r"source 'news': shard .*stream/1\.tar of an earlier epoch is not there any more"
    ):
        table.shards_at(1)
    with pytest.raises(DataError, match=r"1\.tar of an earlier epoch is not there any more"):
        _open(tmp_path)
    assert not _record(tmp_path, 1).exists()


def test_a_shard_that_changed_is_named(tmp_path, stream):
    stream("0.tar", 1)
    table = _open(tmp_path)
    stream("0.tar", 2)
    with pytest.raises(DataError, match=r"shard .*0\.tar has changed .* it had 1 samples .* now 2"):
        table.shards_at(1)
    with pytest.raises(DataError, match=r"0\.tar has changed"):
        _open(tmp_path)


def test_a_touched_or_moved_copy_is_the_same_data(tmp_path, stream):
    stream("0.tar", 1)
    table = _open(tmp_path)
    stream("1.tar", 2)
    table.shards_at(1)
    shutil.move(tmp_path / "stream", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "0.tar", (1, 1))
    moved = _open(tmp_path, str(tmp_path / "moved" / "*.tar"))
    assert (moved.shard_sizes, moved.digest) == (table.shard_sizes, table.digest)
    assert read_member(moved.entry(2), "text", 9) == b"1"
    assert moved.shards_at(2) == 2


def test_a_shard_that_is_still_being_copied_waits(tmp_path, stream, caplog):
    stream("0.tar", 1)
    table = _open(tmp_path)
    path = Path(stream("1.tar", 5))
    whole = path.read_bytes()
    path.write_bytes(whole[:1500])
    with caplog.at_level("WARNING", logger="trichord"):
        assert table.shards_at(1) == 1
    assert "1.tar is left for a later epoch" in caplog.text
    path.write_bytes(whole)
    assert (table.shards_at(2), table.shard_sizes) == (2, [1, 5])


def test_a_list_of_shards_is_read_anew(tmp_path, stream):
    stream("0.tar", 1)
    names = tmp_path / "shards.txt"
    names.write_text("stream/0.tar\n")
    table = _open(tmp_path, str(names))
    stream("1.tar", 2)
    assert table.shards_at(1) == 1
    names.write_text("stream/1.tar\nstream/0.tar\n")
    assert (table.shards_at(2), table.shard_sizes) == (2, [1, 2])


def test_a_remote_prefix_is_listed_anew(tmp_path, text_shards):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/followed/0.tar", Path(text_shards([3])[0]).read_bytes())
    table = _open(tmp_path, "memory://followed/*.tar")
    memory.pipe_file("/followed/1.tar", Path(text_shards([2], "more")[0]).read_bytes())
    assert (table.shards_at(1), table.shard_sizes) == (2, [3, 2])
    assert read_member(table.entry(4), "text", 9) == b"1"


def test_a_damaged_or_foreign_record_stops_the_run(tmp_path, stream):
    stream("0.tar", 1)
    table = _open(tmp_path)
    stream("1.tar", 1)
    table.shards_at(1)
    whole = _record(tmp_path, 1).read_text()
    for damaged in (whole[:50], "[]", '{"format": "else"}', whole.replace('"epoch": 1', '"epoch": 2')):
        _record(tmp_path, 1).write_text(damaged)
        with pytest.raises(DataError, match=r"epoch-000001\.json cannot be read"):
            _open(tmp_path)
    _record(tmp_path, 1).write_text(whole.replace('"known": 1', '"known": 7'))
    with pytest.raises(DataError, match=r"goes on from 7 shards .* records of two runs are mixed up"):
        _open(tmp_path)


def test_no_folder_no_links_no_samples(tmp_path, stream, monkeypatch):
    stream("0.tar", 0)
    with pytest.raises(DataError, match="'news' has no samples in 1 shards"):
        _open(tmp_path)
    assert not _record(tmp_path, 0).exists()  # else the source would stay empty for ever
    stream("1.tar", 1)
    config = ShardsConfig(sources=[{"name": "news", "shards": str(tmp_path / "stream" / "*.tar"), "follow": True}])  # type: ignore
    with pytest.raises(ConfigError, match="'news' is followed, which needs a folder"):
        open_sources(config)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError, match="takes no hard links"):
        _open(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be called '\.\.'"):
        _open(tmp_path, name="..")


def _planner(table: SourceTable, lanes: int) -> LanePlanner:
    source = LaneSource(table.shard_sizes, shards_at=table.shards_at, epochs=3)
    return LanePlanner(3, [source], num_lanes=lanes, window_samples=4)


def _windows(planner: LanePlanner, state: LaneState, most: int = 100):
    refs, after = planner.next_window(state, 0)
    while refs and most:
        yield refs, after
        most -= 1
        refs, after = planner.next_window(after, 0)


def test_lanes_read_the_growing_source_once_per_epoch_and_go_on_after_a_resume(tmp_path, stream):
    lanes = 3
    stream("5.tar", 20)
    table = _open(tmp_path)
    planner = _planner(table, lanes)
    seen, states = [], []
    for lane in range(lanes):
        for number, (refs, after) in enumerate(_windows(planner, planner.first_state(lane))):
            seen += refs
            if (lane, number) == (0, 0):
                stream("3.tar", 7)
            if lane == 1:
                states.append((len(seen), after))
        if lane == 0:
            stream("9.tar", 100)  # after epoch 2 was recorded: too late for all lanes
    expected = {(0, epoch, sample) for epoch, size in enumerate((20, 27, 27)) for sample in range(size)}
    assert len(seen) == len(expected)
    assert set(seen) == expected
    for done, state in states:
        later = _planner(_open(tmp_path), lanes)
        saved = LaneState.from_json(json.loads(json.dumps(state.to_json())))
        rest = [ref for refs, _ in _windows(later, saved) for ref in refs]
        assert rest == seen[done : done + len(rest)]
