"""Shards on an S3 server and an HTTP server that fail in all known ways: what happens, and that no sample is lost.

`pytest -s -k fault_table` prints the table that docs/data/storage.md holds.
"""

import os
import signal
import time
from pathlib import Path

import fsspec
import pytest
from fault_server import FINAL_FAULTS, PASSING_FAULTS, FaultServer

from trichord.core.errors import DataError
from trichord.shards import blocks, patience, storage
from trichord.shards.arguments import argument_shards
from trichord.shards.config import SourceConfig, StorageConfig
from trichord.shards.index import build_index, index_shards, load_index
from trichord.shards.sources import expand_shards
from trichord.shards.storage import configure_storage, open_shard, read_range, shard_identity

SAMPLES = 40
TEXT_BYTES = 3000


@pytest.fixture(autouse=True)
def patient(monkeypatch, own_cache):
    """Short waits, small blocks, nothing left of other tests' servers."""
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.01)
    _forget_connections()
    configure_storage(StorageConfig(block_mib=1 / 64, timeout_s=0.6, read_ahead_blocks=2))
    yield
    configure_storage(StorageConfig())
    _forget_connections()


def _forget_connections():
    storage._known.clear()
    for kind in ("http", "s3"):
        fsspec.get_filesystem_class(kind).clear_instance_cache()


@pytest.fixture
def shard(write_tar) -> Path:
    """40 samples of 3,000 characters: about 10 blocks of 16 KiB."""
    return Path(write_tar([(f"{n:03d}.txt", bytes([97 + n % 26]) * TEXT_BYTES) for n in range(SAMPLES)]))


@pytest.fixture
def web(tmp_path):
    server = FaultServer(folder=tmp_path)
    yield server
    server.stop()


@pytest.fixture
def s3(moto, s3_client, monkeypatch):
    """A bucket behind a server that plants faults."""
    server = FaultServer(upstream=moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.client = s3_client
    server.client.create_bucket(Bucket="shards")
    yield server
    server.stop()


@pytest.fixture(params=["http", "s3"])
def served(request, shard):
    """(server, URL of the shard on it)."""
    server = request.getfixturevalue("web" if request.param == "http" else "s3")
    if request.param == "http":
        return server, f"{server.url}/{shard.name}"
    server.client.upload_file(str(shard), "shards", "deep/s.tar")
    return server, "s3://shards/deep/s.tar"


def _samples_lost(url: str) -> int:
    index = load_index(url)
    lost = 0
    for number in range(SAMPLES):
        ref = index.entry(number).members["text"]
        lost += read_range(url, ref.offset, ref.size) != bytes([97 + number % 26]) * TEXT_BYTES
    return lost + SAMPLES - index.num_samples


def test_all_samples_of_a_remote_shard(served, shard):
    server, url = served
    assert _samples_lost(url) == 0
    with open_shard(url) as file:
        assert file.read() == shard.read_bytes()
        file.seek(-100, os.SEEK_END)
        assert file.read() == shard.read_bytes()[-100:]
    size = shard.stat().st_size
    assert read_range(url, size - 10, 100) == shard.read_bytes()[-10:]
    assert read_range(url, size + 10, 100) == b""
    blocks_fetched = {
        wanted for path, wanted in server.log if path.endswith(".tar") and wanted not in ("", "bytes=0-0")
    }
    again = len(server.log)
    configure_storage(patience.settings())  # a new reader, as in a new process
    assert read_range(url, 0, size) == shard.read_bytes()
    assert len(server.log) == again, "all blocks were in the cache"
    assert len(blocks_fetched) == -(-size // 2**14)


def _table(faults, quick):
    """The S3 half of the table is slow: its client tries again by itself, and waits, before we do."""
    for kind in ("http", "s3"):
        for fault in faults:
            marks = pytest.mark.slow if kind == "s3" and fault not in quick else ()
            yield pytest.param(kind, fault, marks=marks)


_QUICK_ON_S3 = ("stall in the body", "short body under a full range", "other etag", "status 403")


@pytest.mark.parametrize(("served", "fault"), _table(PASSING_FAULTS, _QUICK_ON_S3), indirect=["served"])
def test_fault_table_what_passes(served, fault):
    server, url = served
    server.plan(fault, every=5)
    start = time.monotonic()
    lost = _samples_lost(url)
    seconds = time.monotonic() - start
    print(f"| {url.split(':')[0]} | {fault} | {server.planted} times | retried, all read in {seconds:.1f} s | {lost} |")
    assert lost == 0
    assert server.planted >= 2
    assert seconds < 2 + server.planted * 3


@pytest.mark.parametrize(("served", "fault"), _table(FINAL_FAULTS, _QUICK_ON_S3), indirect=["served"])
def test_fault_table_what_does_not_pass(served, fault):
    server, url = served
    index = build_index(url)
    configure_storage(StorageConfig(block_mib=1 / 128, timeout_s=5, read_ahead_blocks=0))
    server.plan(fault, every=1)
    ref = index.entry(3).members["text"]
    with pytest.raises(DataError) as caught:
        read_range(url, ref.offset, ref.size)
    print(f"| {url.split(':')[0]} | {fault} | {server.planted} times | {caught.value} |")
    expected = {
        "status 401": "access to .* is refused .*credentials are looked for in",
        "status 403": "access to .* is refused .*credentials are looked for in",
        "status 404": "there is no .*s.tar",
        "status 400": "the server refuses the request",
        "range ignored": "the server ignores range requests",
        "other etag": 'changed while it was in use: it had .* and version .*, now .*"another"',
        "other size": "changed while it was in use: it had 153600 bytes .*, now 154112 bytes",
    }[fault]
    assert caught.match(expected)
    assert server.planted == 1, "waiting does not mend it"


def test_an_object_that_changed_is_never_mixed_with_the_old(served, shard):
    server, url = served
    assert _samples_lost(url) == 0
    old = shard.read_bytes()
    new = old.replace(b"aaaa", b"zzzz")
    _replace(server, shard, new)
    # this process goes on with the version it has: from the cache ...
    assert read_range(url, 0, len(old)) == old
    # ... or not at all
    configure_storage(StorageConfig(block_mib=1 / 128, timeout_s=5))
    with pytest.raises(DataError, match="changed while it was in use"):
        read_range(url, 0, len(old))
    # a process that looks anew, with the same cache
    shard_identity(url)
    configure_storage(StorageConfig(block_mib=1 / 64, timeout_s=5))
    assert read_range(url, 0, len(new)) == new


def _replace(server: FaultServer, shard: Path, data: bytes) -> None:
    if server.upstream:
        server.client.put_object(Bucket="shards", Key="deep/s.tar", Body=data)
    else:
        shard.write_bytes(data)


def test_sidecars_of_a_replaced_object_are_built_anew(served, shard):
    server, url = served
    assert load_index(url).entry(0).text_chars == TEXT_BYTES
    requests = len(server.log)
    load_index(url)
    assert len(server.log) - requests <= 4, "a look at the shard, the header, and the two files"
    shard.write_bytes(shard.read_bytes().replace(b"aaaa", b"\xff\xff\xff\xff"))
    _replace(server, shard, shard.read_bytes())
    assert "not UTF-8" in load_index(url).entry(0).problem


def test_sidecars_beside_shards_on_s3_serve_others_and_http_gets_none(s3, web, shard, tmp_path, own_cache, caplog):
    s3.client.upload_file(str(shard), "shards", "mine/s.tar")
    s3.client.put_object(Bucket="shards", Key="mine/s.idx", Body=b"v1.1 1\ntxt 512 3000\n")
    build_index("s3://shards/mine/s.tar")
    assert "s3://shards/mine/s.idx: it lists 1 samples, and the tar holds 40" in caplog.text
    listed = s3.client.list_objects_v2(Bucket="shards", Prefix="mine/")["Contents"]
    assert [item["Key"] for item in listed] == ["mine/s.idx", "mine/s.len", "mine/s.tar"]
    s3.log.clear()
    assert load_index("s3://shards/mine/s.tar").num_samples == SAMPLES
    assert all("s.tar" not in path for path, wanted in s3.log if wanted), "nothing of the shard is read again"
    build_index(f"{web.url}/{shard.name}")
    assert not list(tmp_path.glob("*.len"))
    assert len(list(own_cache.rglob("*.len"))) == 1
    web.log.clear()
    assert load_index(f"{web.url}/{shard.name}").num_samples == SAMPLES
    assert len(web.log) == 1, "one look at the shard: the sidecars are here"


@pytest.mark.slow
def test_many_remote_shards_are_indexed_in_processes_with_the_same_settings(web, text_shards, tmp_path):
    names = [os.path.relpath(path, tmp_path) for path in text_shards([3, 1, 2])]
    urls = [f"{web.url}/{name}" for name in names]
    assert [header.num_samples for header in index_shards(urls, workers=2)] == [3, 1, 2]
    (tmp_path / "all.txt").write_text("texts/t-{000..002}.tar\n")
    assert expand_shards(SourceConfig(name="web", shards=(f"{web.url}/all.txt",))) == urls


def test_globs_list_buckets(s3, shard):
    for key in ("glob/b-1.tar", "glob/b-0.tar", "glob/b-0.len"):
        s3.client.upload_file(str(shard), "shards", key)
    assert expand_shards(SourceConfig(name="s", shards=("s3://shards/glob/*.tar",))) == [
        "s3://shards/glob/b-0.tar",
        "s3://shards/glob/b-1.tar",
    ]
    s3.client.upload_file(str(shard), "shards", "glob/b-2.tar")
    grown = expand_shards(SourceConfig(name="s", shards=("s3://shards/glob/*.tar",)))
    assert len(grown) == 3, "a grown prefix"
    s3.client.upload_file(str(shard), "shards", "glob/below/c.tar")
    s3.client.upload_file(str(shard), "shards", "no-ending")
    for prefix in ("s3://shards/glob", "s3://shards/glob/"):
        assert expand_shards(SourceConfig(name="s", shards=(prefix,))) == grown, "a prefix stands for its tars"
    assert expand_shards(SourceConfig(name="s", shards=("s3://shards/no-ending",))) == ["s3://shards/no-ending"]


def test_missing_credentials_say_where_they_are_looked_for(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"no credentials for s3://shards/x\.tar .*AWS_\* variables, ~/\.aws"):
        shard_identity("s3://shards/x.tar")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://shards/none.tar", r"looking at shard s3://shards/none\.tar: there is no s3://shards/none\.tar"),
        ("s3://nobucket/none.tar", r"looking at shard s3://nobucket/none\.tar: there is no bucket 'nobucket'"),
        ("s3://shards/none/*.tar", r"no shard matches .* \(looked in s3://shards/none\)"),
        ("s3://nobucket/*.tar", r"no shard matches .* \(looked in s3://nobucket \(there is no bucket 'nobucket'\)\)"),
        ("s3://shards/none", r"there is no s3://shards/none; expected a shard, or a folder"),
        ("s3://nobucket/none", r"there is no bucket 'nobucket'; expected a shard, or a folder"),
    ],
)
def test_missing_objects_and_buckets_are_named(s3, url, message):
    with pytest.raises(DataError, match=message):
        [load_index(shard) for shard in expand_shards(argument_shards([url]))]
    assert len(s3.log) <= 6, "nothing is tried again"


def test_read_ahead_fetches_the_next_blocks_and_no_more(web, shard):
    url = f"{web.url}/{shard.name}"
    read_range(url, 0, 10)
    deadline = time.monotonic() + 5
    while len(web.log) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [wanted for _, wanted in web.log] == [
        "bytes=0-0",
        "bytes=0-16383",
        "bytes=16384-32767",
        "bytes=32768-49151",
    ]
    web.log.clear()
    read_range(url, 16384, 10)
    read_range(url, 32768, 10)
    assert not [wanted for _, wanted in web.log if wanted in ("bytes=16384-32767", "bytes=32768-49151")]


def test_a_fault_of_read_ahead_alone_disturbs_no_one(web, shard):
    url = f"{web.url}/{shard.name}"
    shard_identity(url)
    web.plan("status 503", every=2)
    with open_shard(url) as file:
        assert file.read() == shard.read_bytes()


def test_without_a_working_cache_the_run_goes_on_and_says_so_once(web, shard, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    configure_storage(StorageConfig(cache_dir=str(tmp_path / "file"), block_mib=1 / 64, read_ahead_blocks=0))
    url, data = f"{web.url}/{shard.name}", shard.read_bytes()
    assert all(read_range(url, at, 700) == data[at : at + 700] for at in range(0, len(data), 700))
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    assert len(web.log) <= 2 * (len(data) // 2**14 + 1), "the last blocks are kept in memory"


@pytest.mark.parametrize("kind", ["http", pytest.param("s3", marks=pytest.mark.slow)])
def test_forked_workers_read_while_the_parent_reads(request, shard, kind):
    """The parent has an event loop, connections and a read-ahead in flight when it forks."""
    server = request.getfixturevalue("web" if kind == "http" else "s3")
    url = f"{server.url}/{shard.name}" if kind == "http" else "s3://shards/fork/s.tar"
    if kind == "s3":
        server.client.upload_file(str(shard), "shards", "fork/s.tar")
    data = shard.read_bytes()
    read_range(url, 0, 10)
    children = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that hangs must not outlive the test
            start = time.monotonic()
            try:
                right = all(read_range(url, at, 3000) == data[at : at + 3000] for at in range(0, len(data), 3000))
                right = right and shard_identity(url)["size"] == len(data)
                os._exit(0 if right and time.monotonic() - start < 10 else 1)
            except BaseException:
                os._exit(2)
        children.append(pid)
        assert read_range(url, 20000 * number, 9000) == data[20000 * number : 20000 * number + 9000]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert read_range(url, 0, len(data)) == data


def test_memory_stands_for_the_file_systems_without_a_code_of_their_own(shard):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/generic/s.tar", shard.read_bytes())
    url = "memory://generic/s.tar"
    assert _samples_lost(url) == 0
    time.sleep(0.001)
    fs.pipe_file("/generic/s.tar", shard.read_bytes()[::-1])
    configure_storage(StorageConfig(block_mib=1 / 128))
    with pytest.raises(DataError, match="changed while it was in use"):
        read_range(url, 0, 10)


def test_a_stalled_call_of_a_file_system_without_an_event_loop_ends(shard, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/generic/slow.tar", shard.read_bytes())
    url = "memory://generic/slow.tar"
    shard_identity(url)
    calls = []
    real = type(fs).cat_file

    def stalls_once(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            time.sleep(3)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "cat_file", stalls_once)
    start = time.monotonic()
    assert read_range(url, 0, 100) == shard.read_bytes()[:100]
    assert time.monotonic() - start < 2
    assert blocks.block_reader()._timeout_s == 0.6


def test_secrets_in_presigned_addresses_are_not_shown(web, shard, caplog):
    url = f"{web.url}/{shard.name}?X-Amz-Signature=secret"
    assert load_index(url).num_samples == SAMPLES
    web.plan("status 403", every=1)
    configure_storage(StorageConfig(block_mib=1 / 128))
    with pytest.raises(DataError, match=r"s\.tar\?\.\.\. is refused") as caught:
        read_range(url, 0, 10)
    assert "secret" not in str(caught.value) + caplog.text
