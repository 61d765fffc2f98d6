"""Copies on a real S3 server: whole or not there, whatever dies or lies on the way; and back from there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from trichord.checkpoints import mirror as mirror_module
from trichord.checkpoints import mirror_store
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.hashes import file_facts
from trichord.checkpoints.manifest import incomplete_reason
from trichord.checkpoints.mirror import Mirror, fetch_named, fetch_newer, holds_checkpoints
from trichord.checkpoints.mirror_place import require_place
from trichord.checkpoints.mirror_store import MirrorStore
from trichord.checkpoints.retention import Retention
from trichord.core.errors import CheckpointError, ConfigError
from trichord.shards import patience
from trichord.shards.config import StorageConfig
from trichord.shards.storage import configure_storage

BUCKET = "s3://copies/deep"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.01)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    configure_storage(StorageConfig(timeout_s=20, attempts=2))
    yield
    configure_storage(StorageConfig())
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(s3_client):
    """A client of the server, with one bucket."""
    s3_client.create_bucket(Bucket="copies")
    return s3_client


@pytest.fixture(params=["s3", "folder"])
def place(request, tmp_path):
    """A mirror, on S3 or on a mounted disk."""
    if request.param == "folder":
        return str(tmp_path / "mounted")
    request.getfixturevalue("s3")
    return BUCKET


def config(**keys) -> CheckpointsConfig:
    return CheckpointsConfig.model_validate({"mirror": BUCKET, "keep_last": 2, **keys})


def make(run, step: int, size: int = 1000, **metrics):
    """A checkpoint as far as a mirror looks at it."""
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").write_bytes(os.urandom(size))
    (path / "train_state.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    (path / "index.json").write_text("{}")
    files = {file.name: file_facts(file) for file in sorted(path.iterdir())}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return path


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def copied(run, *folders, **keys) -> Mirror:
    mirror = Mirror(run, config(**keys))
    for folder in folders:
        mirror.submit(folder)
        assert mirror.wait(60)
    return mirror


def test_there_and_back(place, tmp_path):
    run = tmp_path / "demo"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    folder = make(run, 100)
    mirror = copied(run, folder, mirror=place)
    assert [(told["step"], told["ok"]) for told in mirror.news()] == [(100, True)]
    assert mirror.news() == []
    assert holds_checkpoints(place, run)
    assert not holds_checkpoints(place, tmp_path / "other")
    elsewhere = tmp_path / "new-machine" / "demo"
    found = fetch_newer(place, elsewhere)
    assert found == elsewhere / "checkpoints" / "step-000100"
    assert incomplete_reason(found) is None
    assert content(found) == content(folder)
    assert (elsewhere / "tokenizer" / "tokenizer.json").exists()
    assert fetch_newer(place, elsewhere) is None, "what is here is as new"
    assert fetch_named(f"{place}/demo", tmp_path / "cache").name == "step-000100"
    with pytest.raises(CheckpointError, match="no complete checkpoint at"):
        fetch_named(f"{place}/demo/step-000200", tmp_path / "cache")


def test_the_same_rules_on_the_mirror(place, tmp_path):
    run = tmp_path / "demo"
    keys = {"mirror": place, "keep_last": 1, "keep_every_steps": 40, "keep_best": {"metric": "m"}}
    for step, value in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 5.0), (50, 4.0), (60, 6.0)):
        folder = make(run, step, m=value)
        copied(run, folder, **keys)  # a new one each time, as after a resume
        Retention(run / "checkpoints", config(**keys)).apply(step)
    store = MirrorStore(f"{place}/demo")
    assert store.steps() == [20, 40, 60]
    assert all(store.complete_manifest(step) for step in store.steps())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000020",
        "step-000040",
        "step-000060",
    ]


def test_a_newer_one_here_is_kept_and_an_older_one_passed(s3, tmp_path):
    run = tmp_path / "demo"
    copied(run, make(run, 10))
    make(run, 20)
    assert fetch_newer(BUCKET, run) is None
    behind = tmp_path / "b" / "demo"
    make(behind, 5)
    shutil.copy(run / "mirrored.json", behind)
    assert fetch_newer(BUCKET, behind).name == "step-000010"


def test_two_runs_of_one_name_are_not_mixed(s3, tmp_path, caplog):
    first, second = tmp_path / "a" / "demo", tmp_path / "b" / "demo"
    copied(first, make(first, 10))
    for step in (5, 20):  # the other's steps are neither older nor newer alone
        (told,) = copied(second, make(second, step)).news()
        assert not told["ok"]
        assert "s3://copies/deep/demo holds the copies of another run of this name, not those of" in told["reason"]
    store = MirrorStore(f"{BUCKET}/demo")
    assert store.steps() == [10]
    for run in (second, tmp_path / "c" / "demo"):
        if run != second:
            make(run, 30)  # never copied, so it has no identity
        with pytest.raises(ConfigError, match="holds the copies of another run of this name"):
            fetch_newer(BUCKET, run)
    moved = tmp_path / "d" / "demo"
    assert fetch_newer(BUCKET, moved).name == "step-000010"
    copied(moved, make(moved, 40))
    assert store.steps() == [10, 40], "who was fetched from there goes on there"
    (moved / "mirrored.json").unlink()
    assert fetch_newer(BUCKET, moved) is None, "one checkpoint in common is enough"


@pytest.mark.parametrize("damage", ["manifest gone", "truncated", "missing", "wrong bytes"])
def test_what_is_damaged_there_is_passed_over(s3, tmp_path, damage, caplog):
    run = tmp_path / "demo"
    copied(run, make(run, 10), make(run, 20))
    key = "deep/demo/step-000020/rank-00000.safetensors"
    if damage == "manifest gone":
        s3.delete_object(Bucket="copies", Key="deep/demo/step-000020/manifest.json")
    elif damage == "missing":
        s3.delete_object(Bucket="copies", Key=key)
    else:
        s3.put_object(Bucket="copies", Key=key, Body=b"x" * (999 if damage == "truncated" else 1000))
    elsewhere = tmp_path / "new" / "demo"
    whole = MirrorStore(f"{BUCKET}/demo").complete_manifest(20) is not None
    assert whole == (damage == "wrong bytes"), "names and sizes are looked at, hashes only when it is fetched"
    found = fetch_newer(BUCKET, elsewhere)
    assert found.name == "step-000010"
    assert [path.name for path in found.parent.iterdir()] == ["step-000010"], "nothing half fetched is left"
    if damage == "wrong bytes":
        assert "rank-00000.safetensors has not the hash of its manifest" in caplog.text
        with pytest.raises(CheckpointError, match="has not the hash"):
            fetch_named(f"{BUCKET}/demo", tmp_path / "cache")
        raw = fetch_named(f"{BUCKET}/demo", tmp_path / "cache", verify=False)
        assert raw.name == "step-000020", "the doctor sees it as it is"


UPLOADER = """
import sys
from pathlib import Path
from trichord.checkpoints.mirror_store import MirrorStore
store = MirrorStore(sys.argv[1])
put = store._put_file
def slowly(path, name):
    print(name, flush=True)
    if name.endswith(sys.argv[3]):
        import time; time.sleep(60)
    return put(path, name)
store._put_file = slowly
store.put(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("at", ["train_state.json", "manifest.json"])
def test_an_upload_that_was_killed_is_no_checkpoint_and_is_made_good(s3, tmp_path, at):
    run = tmp_path / "demo"
    first = make(run, 10)
    copied(run, first)
    second = make(run, 20)
    command = [sys.executable, "-c", UPLOADER, f"{BUCKET}/demo", str(second), at]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().strip().endswith(at):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = MirrorStore(f"{BUCKET}/demo")
    assert store.steps() == [10, 20]
    assert store.complete_manifest(20) is None
    assert fetch_newer(BUCKET, tmp_path / "new" / "demo").name == "step-000010"
    copied(run, second)
    assert store.complete_manifest(20) is not None


def test_a_step_saved_anew_is_none_while_it_is_replaced(s3, tmp_path, monkeypatch):
    run = tmp_path / "demo"
    copied(run, make(run, 10))
    again = make(tmp_path / "again" / "demo", 10)
    store, seen = MirrorStore(f"{BUCKET}/demo"), []
    put = store._put_file
    monkeypatch.setattr(store, "_put_file", lambda *a: (seen.append(store.complete_manifest(10)), put(*a))[1])
    assert store.put(again) > 0
    assert seen
    assert all(manifest is None for manifest in seen)
    assert store.put(again) == 0, "the very same is not sent twice"
    assert content(store.fetch(10, tmp_path / "back")) == content(again)


def test_a_storage_that_fails_is_told_and_nothing_else(s3, tmp_path, caplog):
    run = tmp_path / "demo"
    mirror = copied(run, make(run, 10), mirror="s3://no-such-bucket/x")
    (told,) = mirror.news()
    assert told["step"] == 10
    assert told["ok"] is False
    assert told["reason"]
    assert "mirror: step-000010 is not at s3://no-such-bucket/x/demo" in caplog.text


def test_a_mirror_that_cannot_be_reached_stops_only_a_run_that_has_nothing(tmp_path, monkeypatch, s3, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    configure_storage(StorageConfig(timeout_s=1, attempts=1))
    with pytest.raises(CheckpointError, match=r"the mirror cannot be looked at, and .* holds no checkpoint"):
        fetch_newer(BUCKET, tmp_path / "empty" / "demo")
    make(tmp_path / "demo", 10)
    assert fetch_newer(BUCKET, tmp_path / "demo") is None
    assert "going on from step 10 of this folder" in caplog.text


def test_one_in_flight_and_the_newest_waits(s3, tmp_path, monkeypatch, caplog):
    run, release, begun = tmp_path / "demo", threading.Event(), threading.Event()
    put = MirrorStore.put

    def slow(self, folder):
        begun.set()
        release.wait(60)
        return put(self, folder)

    monkeypatch.setattr(mirror_module.MirrorStore, "put", slow)
    mirror = Mirror(run, config())
    folders = [make(run, step) for step in (10, 20, 30)]
    began = time.monotonic()
    mirror.submit(folders[0])
    assert begun.wait(30)
    for folder in folders[1:]:
        mirror.submit(folder)
    assert time.monotonic() - began < 30, "nobody waited for the upload"
    assert mirror.held == {10, 30}
    Retention(run / "checkpoints", config(keep_last=1)).apply(30, mirror.held)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000010", "step-000030"]
    assert mirror.wait(0.05) is False
    assert "not at s3://copies/deep/demo after 0 s (checkpoints.mirror_wait_s)" in caplog.text
    release.set()
    assert mirror.wait(60)
    assert mirror.store.steps() == [10, 30]


def test_a_place_that_no_file_system_knows(tmp_path):
    with pytest.raises(ConfigError, match=r"^checkpoints at 'nosuch://x"):
        Mirror(tmp_path / "demo", config(mirror="nosuch://x"))
    with pytest.raises(ConfigError, match=r"^checkpoints\.mirror: checkpoints at 'nosuch://x"):
        require_place("nosuch://x", tmp_path / "demo")


def test_a_disk_that_cannot_be_written_is_found_at_the_start(tmp_path, caplog):
    run, file = tmp_path / "demo", tmp_path / "file"
    file.write_text("")
    require_place(str(tmp_path / "copies"), run)
    assert list((tmp_path / "copies" / "demo").iterdir()) == []
    with pytest.raises(ConfigError, match=r"checkpoints\.mirror .*file cannot be written: Not a directory; choose"):
        require_place(str(file), run)
    with pytest.raises(ConfigError, match=r"checkpoints\.mirror /proc cannot be written"):
        require_place("/proc", tmp_path / "sys")  # the folder is there
    make(run, 10)
    require_place(str(file), run)
    assert "cannot be written: Not a directory: there are no copies until it can" in caplog.text


def test_a_mirror_is_not_the_run_itself(tmp_path):
    for mirror in (str(tmp_path), f"file://{tmp_path}/"):
        with pytest.raises(ConfigError, match="where the run itself lies"):
            Mirror(tmp_path / "demo", config(mirror=mirror))


@pytest.mark.parametrize("mirror", ["", "  "])
def test_a_mirror_has_a_name(mirror):
    with pytest.raises(ValueError, match="is blank; expected a place such as s3://bucket/prefix"):
        CheckpointsConfig(mirror=mirror)


def test_a_file_that_is_still_being_written_arrives_whole(tmp_path, monkeypatch):
    store, path = MirrorStore(str(tmp_path / "mounted")), tmp_path / "tokenizer.json"
    path.write_text("")
    ask = store._call

    def write_the_rest(method, *args, **kwargs):
        if method == "put_file":
            path.write_text("whole")
        return ask(method, *args, **kwargs)

    monkeypatch.setattr(store, "_call", write_the_rest)
    assert store._put_file(path, "tokenizer/tokenizer.json") == 5
    assert (tmp_path / "mounted/tokenizer/tokenizer.json").read_text() == "whole"


def test_a_manifest_cannot_lead_elsewhere(s3, tmp_path):
    run = tmp_path / "demo"
    copied(run, make(run, 10))
    manifest = MirrorStore(f"{BUCKET}/demo").manifest(10)
    s3.put_object(Bucket="copies", Key="deep/demo/step-000010/x", Body=b"boo")
    manifest["files"]["../x"] = {"size": 3, "blake3": "0"}
    body = json.dumps(manifest).encode()
    s3.put_object(Bucket="copies", Key="deep/demo/step-000010/manifest.json", Body=body)
    assert fetch_newer(BUCKET, tmp_path / "new" / "demo") is None
    assert not (tmp_path / "new" / "demo" / "checkpoints" / "x").exists()
    for name in ("../x", "/x", "a/b", ""):
        with pytest.raises(CheckpointError, match="expected a name without folders"):
            mirror_store._plain(name)


def test_the_doctor_takes_an_address_and_fetches_what_is_there_as_it_is(s3, tmp_path, monkeypatch, capsys):
    from trichord.cli import main

    monkeypatch.setenv("TRICHORD_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "demo"
    copied(run, make(run, 10))
    s3.put_object(Bucket="copies", Key="deep/demo/step-000010/index.json", Body=b"{ ")
    assert main(["doctor", f"{BUCKET}/demo"]) == 4
    said = capsys.readouterr().out
    assert "bytes have changed since the save: index.json" in said or "index.json has 2 bytes" in said
    assert main(["export", f"{BUCKET}/demo", str(tmp_path / "out")]) == 4
    assert main(["doctor", f"{BUCKET}/nobody"]) == 4
    assert "no checkpoint at s3://copies/deep/nobody" in capsys.readouterr().err
