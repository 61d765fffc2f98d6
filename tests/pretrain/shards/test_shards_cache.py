"""The block cache: its bound, its checksums, and processes that write, evict and die in it at the same time."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from trichord.shards import cache
from trichord.shards.cache import BlockCache, evict

BLOCK = 200_000


def _block(number: int) -> bytes:
    return bytes([number % 251]) * (BLOCK - 1) + b"\n"


def _size(root) -> int:
    """Bytes of all files; those that another process renames meanwhile count as nothing."""
    total = 0
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_what_is_read_is_what_was_written(tmp_path):
    blocks = BlockCache(str(tmp_path), 10**8)
    data = os.urandom(BLOCK)
    blocks.write("ab01", data)
    for start, end in [(0, BLOCK), (0, 1), (65_535, 65_537), (65_536, 131_072), (BLOCK - 1, BLOCK), (5, 5)]:
        assert blocks.read("ab01", start, end) == data[start:end]
    assert blocks.read("ab02", 0, 1) is None
    assert blocks.has("ab01")
    assert not blocks.has("ab02")


@pytest.mark.parametrize(
    "damage", ["a byte of the data", "a byte of the checksums", "the length", "cut", "empty", "magic"]
)
def test_damaged_blocks_are_not_used_and_go(tmp_path, damage, caplog):
    blocks = BlockCache(str(tmp_path), 10**8)
    blocks.write("ab01", os.urandom(BLOCK))
    path = tmp_path / "blocks" / "ab" / "ab01"
    data = bytearray(path.read_bytes())
    at = {"a byte of the data": -BLOCK + 70_000, "a byte of the checksums": 20, "the length": 13, "magic": 0}.get(
        damage
    )
    if at is not None:
        data[at] ^= 1
    path.write_bytes(data[: {"cut": -5, "empty": 0}.get(damage, len(data))])
    assert blocks.read("ab01", 66_000, 90_000) is None
    assert not path.exists()
    assert "is damaged; fetching it again" in caplog.text


def test_what_was_read_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TOUCH_EVERY_S", 0.0)
    blocks = BlockCache(str(tmp_path), 10**9)
    for number in range(10):
        blocks.write(f"{number:02d}", _block(number))
        os.utime(tmp_path / "blocks" / f"{number:02d}" / f"{number:02d}", (1000 + number, 1000 + number))
    blocks.read("00", 0, 1)
    evict(tmp_path, 5 * BLOCK)
    assert [number for number in range(10) if blocks.has(f"{number:02d}")] == [0, 7, 8, 9]


def test_left_overs_of_killed_processes_go_after_a_while(tmp_path):
    folder = tmp_path / "blocks" / "ab"
    folder.mkdir(parents=True)
    for name, age in ((".new-old", 7200), (".new-young", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    evict(tmp_path, 10**9)
    assert [path.name for path in folder.iterdir()] == [".new-young"]


_READER = """
import random, sys, time
from trichord.shards.cache import BlockCache
root, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
blocks, rng, hits, misses = BlockCache(root, 2_000_000), random.Random(seed), 0, 0
end = time.monotonic() + seconds
while time.monotonic() < end or min(hits, misses) <= 20:
    number = rng.randrange(20)
    data = bytes([number]) * 199_999 + b"\\n"
    start = rng.randrange(200_000)
    found = blocks.read(f"{number:02d}{number:02d}", start, min(start + 70_000, 200_000))
    if found is None:
        misses += 1
        blocks.write(f"{number:02d}{number:02d}", data)
    else:
        hits += 1
        assert found == data[start : start + 70_000], "wrong bytes"
print(hits, misses)
"""


def _start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _READER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_six_processes_under_eviction_read_all_bytes_right(tmp_path):
    """Twenty blocks of 200 kB share a cache of 2 MB; it is measured while all are halted."""
    readers = [_start(tmp_path, seed, 1.5) for seed in range(6)]
    peak = 0
    while all(reader.poll() is None for reader in readers):
        for reader in readers:
            reader.send_signal(signal.SIGSTOP)
        peak = max(peak, _size(tmp_path))
        for reader in readers:
            reader.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    for reader in readers:
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert all(int(count) > 20 for count in out.split()), "hits and misses"
    # each may be writing one block, and have written one while another was evicting
    assert 1_800_000 < peak <= 2_000_000 + 6 * 2 * 201_000


def test_kill_9_in_the_middle_of_writes_leaves_nothing_broken(tmp_path, caplog):
    for seed in range(6):
        writer = _start(tmp_path, seed, 60)
        deadline = time.monotonic() + 30
        while _size(tmp_path) < 600_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.003 * seed)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        blocks = BlockCache(str(tmp_path), 2_000_000)
        for number in range(20):
            found = blocks.read(f"{number:02d}{number:02d}", 0, 200_000)
            assert found in (None, bytes([number]) * 199_999 + b"\n")
        for path in (tmp_path / "blocks").glob("0*/*"):
            path.unlink()
    assert "damaged" not in caplog.text


_DIES_HALFWAY = """
import io, os, signal, sys
from trichord.shards import cache

class Half(io.FileIO):
    def write(self, data):
        if len(data) > 100_000:
            super().write(data[:70_000])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)

cache.os.fdopen = lambda handle, mode: Half(handle, mode)
cache.BlockCache(sys.argv[1], 10**9).write("ab01", b"x" * 200_000)
"""


def test_a_block_half_written_by_a_killed_process_is_never_seen(tmp_path, caplog):
    done = subprocess.run([sys.executable, "-c", _DIES_HALFWAY, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    blocks = BlockCache(str(tmp_path), 10**9)
    assert [path.stat().st_size for path in (tmp_path / "blocks" / "ab").iterdir()] == [70_032]
    assert not blocks.has("ab01")
    assert blocks.read("ab01", 0, 10) is None
    assert not caplog.records, "nothing to tell"
    blocks.write("ab01", b"y" * 200_000)
    assert blocks.read("ab01", 150_000, 150_010) == b"y" * 10


def test_a_full_disk_is_told_once_and_tried_again_later(tmp_path, monkeypatch, caplog):
    blocks = BlockCache(str(tmp_path), 10**8)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", full)
        for number in range(3):
            blocks.write(f"ab{number}", b"data")
            monkeypatch.setattr(blocks, "_off_until", 0.0)
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.rglob(".new-*"))
    blocks.write("ab9", b"data")
    assert blocks.read("ab9", 0, 4) == b"data"
