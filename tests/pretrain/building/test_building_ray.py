"""The same shards from tasks of a real Ray, started here and stopped again."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from building_world import digests, make_world, put

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def test_ray_writes_the_same_bytes_and_leaves_nothing_running(tmp_path):
    make_world(tmp_path)
    before = _ray_processes()
    command = [
        "data",
        "build",
        "birds",
        "--column",
        "text=caption",
        "--samples-per-shard",
        "1",
        "--workers",
        "2",
        "--out",
    ]
    for out, more in (("plain", []), ("by-ray", ["--ray"])):
        code = f"import sys; from trichord.cli import main; sys.exit(main({[*command, out, *more]!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert len(digests(tmp_path / "by-ray")) == 5
    assert digests(tmp_path / "by-ray") == digests(tmp_path / "plain")
    deadline = time.monotonic() + 30
    while _ray_processes() - before:
        assert time.monotonic() < deadline, "Ray outlives the build"
        time.sleep(0.2)


def test_a_bad_sample_in_a_ray_task_is_named(tmp_path):
    make_world(tmp_path)
    (tmp_path / "animals/otter/c.jpg").write_bytes(b"no picture")
    words = ["data", "build", "animals", "--from", "imagefolder", "--workers", "2", "--ray", "--out", "out"]
    code = f"import sys; from trichord.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 3
    assert "otter/c.jpg: not an image" in done.stderr


def test_a_stopped_build_ends_its_cluster_and_says_one_line(tmp_path):
    make_world(tmp_path)
    before = _ray_processes()
    put(tmp_path / "t.jsonl", '{"text": "a"}\n' * 20_000)
    words = ["data", "build", "t.jsonl", "--samples-per-shard", "1", "--workers", "2", "--ray", "--out", "out"]
    code = f"import sys; from trichord.cli import main; sys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out/.shard.partial").glob("0*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(r"^stopped; \d+ of 20000 shards are there", said.splitlines()[-1])
    assert "SIGTERM received" not in said, "Ray's C++ handler prints its stack"
    while _ray_processes() - before:
        assert time.monotonic() < deadline, "Ray outlives the build"
        time.sleep(0.2)


LISTENING = """
import glob, os, re
from trichord.building.processes import run_tasks

def listening():
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                sockets[words[9]] = words[1].split(":")[0]
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            if os.environ["MARK"] in open(folder + "/environ").read():
                links = [os.readlink(file) for file in glob.glob(folder + "/fd/*")]
                found = [re.match(r"socket:.(\\d+)", link) for link in links]
                yield from (sockets[match[1]] for match in found if match and match[1] in sockets)
        except OSError:
            pass

results = run_tasks(os.path.basename, ["x/a", "x/b", "x/c"], 2, ray=True)
first = next(results)
print(sorted(set(listening())), sorted([first, *results]))
"""


def test_a_cluster_started_here_listens_on_the_loopback_address(monkeypatch):
    before = {*Path("/tmp").glob("ray-*")}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environment = {**os.environ, "MARK": "mark-of-this-test"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    addresses = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    found, results = ast.literal_eval(done.stdout.strip().replace("] [", "], ["))
    assert found
    assert set(found) <= addresses
    assert results == ["a", "b", "c"]
    assert {*Path("/tmp").glob("ray-*")} <= before, "its logs go with it"


def _ray_processes() -> set[int]:
    found = set()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_text()
        except OSError:
            continue
        if any(name in words for name in ("raylet", "gcs_server", "ray::")):
            found.add(int(command.parent.name))
    return found
