"""Builds by many processes, cut off and taken up again: always the bytes of the undisturbed one."""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from building_world import digests, members, picture, problems, put

from trichord.building import build as build_module
from trichord.building.build import BuildRow, Layout, build, build_shards
from trichord.core.errors import ConfigError, DataError

SAMPLES = 60


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of pictures of different sizes with texts."""
    for number in range(SAMPLES):
        put(tmp_path / f"data/{number:03d}.jpg", picture(number, size=(8 + number % 7 * 40, 12)))
        put(tmp_path / f"data/{number:03d}.txt", f"picture {number}")
    return tmp_path / "data"


def rows(folder: Path) -> list[BuildRow]:
    return [
        BuildRow(f"{number:03d}", {ext: folder / f"{number:03d}.{ext}" for ext in ("jpg", "txt")})
        for number in range(SAMPLES)
    ]


def make(folder: Path, out: Path, seed: int | None = None, **options) -> dict[str, bytes]:
    build(rows(folder), out, Layout(samples_per_shard=8, shuffle=seed), identity={"of": "pictures"}, **options)
    assert not list(out.glob(".*")), "the partial folder must go"
    return digests(out)


@pytest.mark.parametrize(("seed", "workers"), [(None, 1), (7, 3)])
def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path, seed, workers):
    alone = make(source, tmp_path / "one", seed)
    assert make(source, tmp_path / "three", seed, workers=workers) == alone
    assert len(alone) == 8
    keys = list(members(sorted((tmp_path / "three").glob("*.tar"))))
    assert sorted(keys) == [row.key for row in rows(source)]
    assert (keys == sorted(keys)) is (seed is None)


def test_the_bytes_are_those_of_webdataset(source, tmp_path):
    import webdataset

    (path,) = build_shards(rows(source), tmp_path / "ours")
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, encoder=False, mtime=0, user="root", group="root") as writer:
        for row in rows(source):
            writer.write(
                {"__key__": row.key, **{ext: Path(str(file)).read_bytes() for ext, file in row.members.items()}}
            )
    assert Path(path).read_bytes() == stream.getvalue()


def test_a_build_that_is_stopped_and_killed_goes_on_with_its_finished_shards(source, tmp_path):
    command = [
        *[
            "data",
            "build",
            "data",
            "--from",
            "folder",
            "--samples-per-shard",
            "1",
            "--workers",
            "2",
            "--shuffle",
            "3",
            "--out",
        ],
        "out",
    ]
    code = f"import sys; from trichord.cli import main; sys.exit(main({command!r}))"
    partial = tmp_path / "out" / ".shard.partial"
    process = _run_until(partial, 3, code, tmp_path)
    workers = _children(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(
        rf"stopped; \d+ of {SAMPLES} shards are there \(in out/\.shard\.partial\); the same command goes on\n", said
    )
    _wait_until_gone(workers)
    process = _run_until(partial, len(list(partial.glob("0*.json"))) + 3, code, tmp_path)
    workers = _children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    _wait_until_gone(workers)
    assert not list((tmp_path / "out").glob("*.tar")), "no shard has its name before all are whole"
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.tar") if path.with_suffix(".json").exists()}
    assert 3 <= len(kept) < SAMPLES, "killed too late: nothing was left to do"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    after = {path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert set(kept.values()) <= after, "finished shards are moved, not written again"
    layout = Layout(samples_per_shard=1, shuffle=3)
    build(rows(source), tmp_path / "undisturbed", layout)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert problems(sorted((tmp_path / "out").glob("*.tar"))) == [None] * SAMPLES


def _run_until(partial: Path, shards: int, code: str, folder: Path) -> subprocess.Popen:
    """A build, in a session of its own, that has finished so many shards and goes on."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("0*.json"))) < shards:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_workers_die_with_their_parent_in_the_middle_of_a_shard():
    code = "import time; from trichord.building.processes import run_tasks; list(run_tasks(time.sleep, [60, 60], 2))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while len(workers := _children(process.pid)) < 2 or not all(map(_sleeps, workers)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    _wait_until_gone(workers)


def _sleeps(pid: int) -> bool:
    """Whether a worker is in its task: `time.sleep` waits in clock_nanosleep."""
    try:
        return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    """Children of a process that have not ended, but for multiprocessing's own tracker."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "spawn_main" in command:
            found.append(int(stat.parent.name))
    return found


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _cut_off(source: Path, out: Path, monkeypatch, shards: int) -> None:
    """A build that ends like a crash after some shards."""
    written = []

    def make_shard(task):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(task)
        return build_shard(task)

    build_shard = build_module.make_shard
    monkeypatch.setattr(build_module, "make_shard", make_shard)
    with pytest.raises(KeyboardInterrupt):
        make(source, out)
    monkeypatch.setattr(build_module, "make_shard", build_shard)


def test_a_finished_shard_that_was_damaged_since_is_written_again(source, tmp_path, monkeypatch):
    _cut_off(source, tmp_path / "out", monkeypatch, 2)
    tar = tmp_path / "out/.shard.partial/000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert make(source, tmp_path / "out") == make(source, tmp_path / "undisturbed")


def test_a_build_goes_on_after_a_crash_between_renames(source, tmp_path, monkeypatch):
    moved = []
    rename = os.replace

    def replace(old, new):
        if Path(new).match("shard-*.tar"):
            if len(moved) == 3:
                raise KeyboardInterrupt
            moved.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "out")
    monkeypatch.setattr(os, "replace", rename)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert make(source, tmp_path / "out") == make(source, tmp_path / "undisturbed")


def test_a_build_goes_on_from_another_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _cut_off(Path("data"), Path("out"), monkeypatch, 2)
    monkeypatch.chdir(source)
    assert make(Path("elsewhere"), Path("../out")) == make(source, tmp_path / "undisturbed")


def test_a_half_done_build_of_something_else_is_left_alone(source, tmp_path, monkeypatch):
    _cut_off(source, tmp_path / "out", monkeypatch, 2)
    with pytest.raises(
        ConfigError, match=r"half-done build of something else: layout\.samples_per_shard was 8 and is 9.*rm -r"
    ):
        build(rows(source), tmp_path / "out", Layout(samples_per_shard=9), identity={"of": "pictures"})
    with pytest.raises(ConfigError, match=r"source\.of was 'pictures' and is 'else'"):
        build(rows(source), tmp_path / "out", Layout(samples_per_shard=8), identity={"of": "else"})
    assert make(source, tmp_path / "out") == make(source, tmp_path / "undisturbed")


def test_a_file_that_changed_since_the_plan_is_named(source, tmp_path, monkeypatch):
    _cut_off(source, tmp_path / "out", monkeypatch, 2)
    put(source / "059.txt", "another text")
    with pytest.raises(DataError, match=r"059\.txt has 12 bytes, and had 10 when the build was planned; .*goes on"):
        make(source, tmp_path / "out")
    (source / "059.txt").unlink()
    way_out = r"began; .* anew, remove .*rm -r .*out/\.shard\.partial \(finished shards that go with it: 7"
    with pytest.raises(DataError, match=rf"cannot read .*059\.txt .*which was there when the build {way_out}"):
        make(source, tmp_path / "out")


def test_a_source_is_listed_anew_where_no_shard_was_finished(tmp_path):
    good = BuildRow("good", {"jpg": put(tmp_path / "good.jpg", picture())})
    bad = BuildRow("bad", {"jpg": put(tmp_path / "bad.jpg", "")})
    build_again = functools.partial(build, out_dir=tmp_path / "out", layout=Layout(), identity={"of": "pictures"})
    with pytest.raises(DataError, match=r"repair or remove it, .*; no shard is finished yet: .* lists the source anew"):
        build_again([good, bad])
    Path(tmp_path / "bad.jpg").unlink()
    assert build_again([good]).samples == 1


def test_shards_that_came_in_the_way_are_not_overwritten(source, tmp_path, monkeypatch):
    _cut_off(source, tmp_path / "out", monkeypatch, 2)
    put(tmp_path / "out/shard-000003.tar", "mine")
    with pytest.raises(ConfigError, match=r"shard-000003\.tar is there already"):
        make(source, tmp_path / "out")
    assert (tmp_path / "out/shard-000003.tar").read_text() == "mine"


def test_two_builds_of_one_name_do_not_meet(source, tmp_path):
    import fcntl

    folder = tmp_path / "out/.shard.partial"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process builds in .*partial; wait for it"):
            make(source, tmp_path / "out")


def test_bad_samples_are_left_out_by_any_number_of_workers(source, tmp_path):
    for number in range(15, 22):  # all of the third shard
        put(source / f"{number:03d}.jpg", b"no picture")
    put(source / "040.txt", b"\xff")
    result = build(rows(source), tmp_path / "one", Layout(samples_per_shard=8), on_bad="skip", workers=2)
    assert (result.samples, len(result.left_out)) == (SAMPLES - 8, 8)
    assert [Path(path).name for path in result.paths] == [f"shard-{number:06d}.tar" for number in range(7)]
    assert re.search(r"040\.txt: text is not UTF-8", result.left_out[-1][1])
    with pytest.raises(DataError, match=r"sample '\d+': .*; repair or remove it, or leave out"):
        make(source, tmp_path / "stopped", workers=2)
    skipped = make(source, tmp_path / "stopped", on_bad="skip")  # the same build goes on, less strictly
    assert skipped == digests(tmp_path / "one")


def test_a_worker_that_dies_ends_the_build_with_a_word(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "make_shard", _die)
    with pytest.raises(DataError, match=r"a process that wrote shards died .*run the same command again"):
        make(source, tmp_path / "out", workers=2)
    monkeypatch.undo()
    assert make(source, tmp_path / "out") == make(source, tmp_path / "undisturbed")


def _die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_cannot_be_written_is_named(source, tmp_path):
    put(tmp_path / "file", "")
    with pytest.raises(ConfigError, match=r"cannot write to .*file: Not a directory; choose another --out"):
        make(source, tmp_path / "file")


def test_the_room_is_imported_without_its_libraries():
    code = (
        "import sys, trichord.building.build, trichord.building.kinds, trichord.building.split\n"
        "print({'torch', 'numpy', 'PIL', 'pyarrow', 'ijson', 'webdataset', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
