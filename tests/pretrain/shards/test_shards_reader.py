"""Reading members: the right bytes, retries, caps, forks, remote files."""

import errno
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest

from trichord.core.errors import DataError
from trichord.shards import patience, reader, storage
from trichord.shards.config import ShardsConfig, StorageConfig
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import open_sources, read_member


def _last_data(path: str) -> int:
    """Where the data of the last member starts: a tar cut there has lost it."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[-1].offset_data


def _config(*sources: list[str], **options) -> ShardsConfig:
    return ShardsConfig(
        sources=[{"name": f"s{n}", "shards": shards, **options} for n, shards in enumerate(sources)],  # type: ignore
        max_members_per_sample=4,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.0)
    storage._open_files._files.clear()


def test_every_sample_by_number(text_shards):
    (table,) = open_sources(_config(text_shards([3, 0, 4])))
    assert (table.name, table.num_samples, table.shard_sizes) == ("s0", 7, [3, 0, 4])
    for number in (6, 0, 3, 2, 5):
        entry = table.entry(number)
        assert entry.key == f"{number:05d}"
        assert read_member(entry, "text", 10) == str(number).encode()
    with pytest.raises(IndexError, match="samples 0 to 6, asked for 7"):
        table.entry(7)


def test_a_table_travels_to_workers_without_its_cache(text_shards):
    (table,) = open_sources(_config(text_shards([3])))
    table.entry(0)
    copy = pickle.loads(pickle.dumps(table))
    assert len(copy._indices) == 0
    assert copy.entry(2) == table.entry(2)


def test_the_cache_of_indices_is_bounded(text_shards, monkeypatch):
    monkeypatch.setattr(reader, "MAX_CACHED_INDICES", 2)
    (table,) = open_sources(_config(text_shards([1, 1, 1, 1])))
    assert [table.entry(number).key for number in range(4)] == [f"{n:05d}" for n in range(4)]
    assert len(table._indices) == 2


def test_no_samples_is_an_error_that_says_why(text_shards, tmp_path):
    with pytest.raises(DataError, match=r"source 's0' has no samples in 1 shards .*t-000\.tar.*KEY\.EXTENSION"):
        open_sources(_config(text_shards([0])))
    (tmp_path / "cut.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no samples.*0 bytes"):
        open_sources(_config([str(tmp_path / "cut.tar")]))


def test_a_cut_shard_gives_one_record(text_shards):
    paths = text_shards([3, 3])
    with open(paths[1], "r+b") as file:
        file.truncate(_last_data(paths[1]))
    (table,) = open_sources(_config(paths))
    (record,) = table.damage_records()
    assert (record.shard, record.source, record.key) == (paths[1], "s0", None)
    assert "is cut" in record.reason
    assert table.shard_sizes == [3, 2]


def test_a_shard_that_changes_during_the_run_stops_it(text_shards):
    paths = text_shards([3])
    (table,) = open_sources(_config(paths))
    text_shards([5])
    with pytest.raises(DataError, match=r"it had 3 samples with index .* and has 5 with"):
        table.entry(0)


def test_as_many_samples_but_other_ones_stop_it_too(write_tar):
    path = write_tar([("0.txt", b"x")])
    (table,) = open_sources(_config([path]))
    write_tar([("1.txt", b"longer")])
    with pytest.raises(DataError, match=r"s\.tar changed while it was in use"):
        table.entry(0)


def test_the_digest_is_of_the_content_in_order_not_of_its_place(text_shards, tmp_path):
    paths = text_shards([3, 2])
    (table,) = open_sources(_config(paths))
    copies = [str(shutil.copy(path, tmp_path / f"copy-{number}.tar")) for number, path in enumerate(paths)]
    assert open_sources(_config(copies))[0].digest == table.digest
    swapped = [str(shutil.copy(path, tmp_path / f"swap-{1 - number}.tar")) for number, path in enumerate(paths)]
    assert open_sources(_config(swapped))[0].digest != table.digest


def test_opening_sets_the_patience_of_this_process(text_shards):
    config = _config(text_shards([1]))
    open_sources(config.model_copy(update={"storage": StorageConfig(attempts=2)}))
    assert patience.settings().attempts == 2
    open_sources(config)
    assert patience.settings().attempts == 6


def test_caps_and_missing_fields_are_bad_samples(write_tar):
    (table,) = open_sources(_config([write_tar([("0.txt", b"four"), ("0.a", b""), ("0.b", b""), ("0.c", b"")])]))
    entry = table.entry(0)
    with pytest.raises(BadSample, match=r"0\.txt: 4 bytes, more than shards\.max_member_bytes 3"):
        read_member(entry, "text", 3)
    with pytest.raises(BadSample, match="the sample has no image; it has text"):
        read_member(entry, "image", 3)
    (table,) = open_sources(
        _config([write_tar([(f"0.{ext}", b"") for ext in ("txt", "a", "b", "c", "d")], "five.tar")])
    )
    assert table.entry(0).problem == "5 members, more than shards.max_members_per_sample 4"


def test_a_short_read_is_a_bad_sample(text_shards):
    paths = text_shards([2])
    (table,) = open_sources(_config(paths))
    entry = table.entry(1)
    with open(paths[0], "r+b") as file:
        file.truncate(entry.members["text"].offset)
    with pytest.raises(BadSample, match="cut: 0 of 1 bytes are there"):
        read_member(entry, "text", 10)


def test_io_errors_are_tried_again_with_a_new_handle(text_shards, monkeypatch):
    (table,) = open_sources(_config(text_shards([2])))
    entry, real, calls = table.entry(1), os.pread, []

    def flaky(descriptor, size, offset):
        calls.append(descriptor)
        if len(calls) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, size, offset)

    opened, file_io = [], io.FileIO
    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(storage.io, "FileIO", lambda path: opened.append(path) or file_io(path))
    assert read_member(entry, "text", 10) == b"1"
    assert (len(calls), len(opened)) == (3, 3)


def test_io_that_keeps_failing_stops_the_run(text_shards, monkeypatch):
    (table,) = open_sources(_config(text_shards([2])))
    entry, calls = table.entry(1), []

    def broken(*_):
        calls.append(1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(
        DataError, match=r"'00001\.txt' of shard .*failed 6 times.*Input/output error; .* start again$"
    ) as caught:
        read_member(entry, "text", 10)
    assert caught.value.exit_code == 3
    assert len(calls) == patience.settings().attempts == 6


def test_a_deleted_shard_is_not_tried_again(text_shards, monkeypatch):
    paths = text_shards([2])
    (table,) = open_sources(_config(paths))
    entry = table.entry(0)
    os.unlink(paths[0])
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("waiting does not bring it back"))
    with pytest.raises(DataError, match="check that the shard is there"):
        read_member(entry, "text", 10)


def test_open_files_are_bounded(text_shards, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 2)
    (table,) = open_sources(_config(text_shards([1] * 5)))
    for _ in range(2):
        assert [read_member(table.entry(n), "text", 9) for n in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(storage._open_files) == 2


def test_parent_and_forked_children_read_the_right_bytes(text_shards):
    """The descriptors are shared over the fork; a shared file position would mix the reads up."""
    (table,) = open_sources(_config(text_shards([40])))
    entries = [table.entry(number) for number in range(40)]
    read_member(entries[0], "text", 9)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            good = all(read_member(e, "text", 9) == str(n).encode() for _ in range(20) for n, e in enumerate(entries))
            os._exit(0 if good else 1)
        children.append(child)
    assert all(read_member(e, "text", 9) == str(n).encode() for _ in range(20) for n, e in enumerate(entries))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_remote_shards_by_range_reads(text_shards):
    paths, fs = text_shards([2, 3]), fsspec.filesystem("memory")
    for number, path in enumerate(paths):
        fs.pipe_file(f"/reader/t-{number}.tar", Path(path).read_bytes())
    (table,) = open_sources(_config(["memory://reader/t-{0..1}.tar"]))
    assert read_member(table.entry(4), "text", 9) == b"4"
    assert fs.exists("/reader/t-0.len")
    assert fs.exists("/reader/t-0.idx")
    assert open_sources(_config(["memory://reader/*.tar"]))[0].num_samples == 5
    fs.pipe_file("/reader/t-1.tar", Path(text_shards([1], "other")[0]).read_bytes())
    assert open_sources(_config(["memory://reader/*.tar"]))[0].num_samples == 3


def test_a_missing_remote_shard_is_named():
    with pytest.raises(DataError, match=r"looking at shard memory://nowhere/0\.tar"):
        open_sources(_config(["memory://nowhere/0.tar"]))


def test_pickled_members_are_mentioned_once_per_source(write_tar, caplog):
    path = write_tar([("0.txt", b"x"), ("0.pkl", pickle.dumps(print)), ("1.txt", b"y"), ("1.pyd", b"z")])
    with caplog.at_level("WARNING", logger="trichord"):
        open_sources(_config([path]))
    assert [r.getMessage() for r in caplog.records] == [
        "source s0: 2 members with pickled code (.pyd, .pkl, .pth, ...) ignored"
    ]
