"""tar.gz: unpacked once, by one process, within bounds; what is cut gives its whole samples."""

import gzip
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_server import FaultServer

from trichord.core.errors import DataError
from trichord.shards import storage, unpack
from trichord.shards.config import StorageConfig
from trichord.shards.index import load_header, load_index
from trichord.shards.storage import configure_storage, open_shard, read_range


@pytest.fixture(autouse=True)
def settings():
    storage._known.clear()
    configure_storage(StorageConfig(block_mib=1 / 16))
    yield
    configure_storage(StorageConfig())
    storage._known.clear()


@pytest.fixture
def members():
    return [(f"{n:03d}.txt", os.urandom(1000).hex().encode()) for n in range(30)]


@pytest.fixture
def packed(write_tar, members, tmp_path) -> Path:
    plain = Path(write_tar(members))
    path = tmp_path / "packed" / "s.tar.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def _texts(url: str) -> list[bytes]:
    index = load_index(url)
    refs = [index.entry(number).members["text"] for number in range(index.num_samples)]
    return [read_range(url, ref.offset, ref.size) for ref in refs]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz"])
def test_samples_of_a_packed_shard(packed, members, name, own_cache):
    path = packed.rename(packed.with_name(name))
    assert _texts(str(path)) == [data for _, data in members]
    assert [item.name for item in packed.parent.iterdir()] == [name], "its sidecars are in the cache"
    assert sorted(item.suffix for item in own_cache.rglob("[!.]*.*") if item.is_file()) == [".idx", ".len", ".tar"]


def test_it_is_unpacked_once_and_again_when_it_changed(packed, members, monkeypatch, write_tar):
    calls = []
    real = unpack._unpack
    monkeypatch.setattr(unpack, "_unpack", lambda *args: (calls.append(args[0]), real(*args)))
    assert _texts(str(packed)) == _texts(str(packed)) == [data for _, data in members]
    assert len(calls) == 1
    packed.write_bytes(gzip.compress(Path(write_tar([("new.txt", b"new")], "n.tar")).read_bytes()))
    assert _texts(str(packed)) == [b"new"]
    assert len(calls) == 2


def test_a_packed_shard_on_a_server(packed, members, tmp_path):
    server = FaultServer(folder=tmp_path)
    try:
        server.plan("body ends early", every=2, ending=".gz")
        assert _texts(f"{server.url}/packed/s.tar.gz") == [data for _, data in members]
        assert server.planted
    finally:
        server.stop()


def test_an_evicted_copy_is_unpacked_again(packed, members, own_cache, monkeypatch, caplog):
    monkeypatch.setattr(storage, "_LOOK_AT_UNPACKED_S", 0.0)
    assert _texts(str(packed)) == [data for _, data in members]
    for _ in range(2):
        for copy in (own_cache / "unpacked").glob("*.tar"):
            copy.unlink()
        assert _texts(str(packed)) == [data for _, data in members]
    assert "is too small for the shards in use" in caplog.text


def test_another_thread_finds_an_evicted_copy_gone_and_unpacks_it(packed, own_cache):
    expected = read_range(str(packed), 512, 2000)
    for copy in (own_cache / "unpacked").glob("*.tar"):
        copy.unlink()
    assert read_range(str(packed), 512, 2000) == expected, "still open in this thread"
    found = []
    reader = threading.Thread(target=lambda: found.append(read_range(str(packed), 512, 2000)))
    reader.start()
    reader.join(30)
    assert found == [expected]


def test_an_open_copy_outlives_its_eviction(packed, own_cache):
    with open_shard(str(packed)) as file:
        for copy in (own_cache / "unpacked").glob("*.tar"):
            copy.unlink()
        assert len(file.read()) > 60_000


def test_a_bomb_ends_at_the_bound_and_leaves_nothing(tmp_path, own_cache):
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    configure_storage(StorageConfig(cache_gib=1 / 64))
    with pytest.raises(DataError, match=r"bomb\.tar\.gz unpacks to more than 16777216 bytes.*cache_gib \(0\.015625\)"):
        load_header(str(bomb))
    assert not [path for path in (own_cache / "unpacked").iterdir() if path.stat().st_size]


def test_the_free_disk_is_a_bound_too(packed, monkeypatch):
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(DataError, match=r"unpacks to more than 9000 bytes"):
        load_header(str(packed))


def test_a_cut_stream_gives_its_whole_samples(packed, members, caplog):
    data = packed.read_bytes()
    packed.write_bytes(data[: len(data) // 2])
    found = _texts(str(packed))
    assert 5 < len(found) < len(members)
    assert found == [data for _, data in members[: len(found)]]
    assert "left out" in load_index(str(packed)).damage
    assert "the gzip stream is cut" in caplog.text


@pytest.mark.parametrize("at", [0.5, 0.99999])
def test_a_damaged_stream_is_not_used(packed, at):
    data = bytearray(packed.read_bytes())
    data[int(len(data) * at) - 4] ^= 1
    packed.write_bytes(data)
    with pytest.raises(DataError, match=r"s\.tar\.gz is no whole gzip file \(.*incorrect data check"):
        load_header(str(packed))


def test_what_is_no_gzip_is_named(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"<html>not here</html>" * 99)
    with pytest.raises(DataError, match=r"x\.tar\.gz is no whole gzip file .*incorrect header"):
        load_header(str(tmp_path / "x.tar.gz"))


def test_several_streams_in_one_file_and_padding(write_tar, members, tmp_path):
    data = Path(write_tar(members)).read_bytes()
    path = tmp_path / "two.tar.gz"
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + bytes(512))
    assert _texts(str(path)) == [data for _, data in members]


def test_processes_at_once_unpack_once(packed, tmp_path, own_cache):
    code = (
        "import sys; from trichord.shards import unpack; real = unpack._unpack; calls = []\n"
        "import time; unpack._unpack = lambda *a: (calls.append(1), time.sleep(0.5), real(*a))\n"
        "from trichord.shards.storage import read_range\n"
        "assert len(read_range(sys.argv[1], 512, 2000)) == 2000\nprint(len(calls))"
    )
    command = [sys.executable, "-c", code, str(packed)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(child.communicate(timeout=60)[0].strip() for child in children) == ["0", "0", "1"]


def test_a_lock_that_is_not_given_up_is_not_waited_for_for_ever(packed, members, monkeypatch, own_cache):
    import fcntl

    configure_storage(StorageConfig(timeout_s=0.01))
    done = []
    reader = threading.Thread(target=lambda: done.append(_texts(str(packed))))
    folder = own_cache / "unpacked"
    folder.mkdir(parents=True)
    facts = os.stat(packed)
    held = folder / (unpack.name_of(str(packed), facts.st_size, facts.st_mtime_ns) + ".tar.lock")
    with open(held, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        reader.start()
        reader.join(30)
    assert done == [[data for _, data in members]]
    assert time.monotonic() - start > 0.5
