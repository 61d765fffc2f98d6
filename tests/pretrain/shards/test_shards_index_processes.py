"""The processes that index shards: gone with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_INDEXES_FOR_EVER = """
import sys
from trichord.shards.index import index_shards
if __name__ == "__main__":
    index_shards(sys.argv[1:], workers=2)
"""


def _children(pid: int) -> list[int]:
    """Pool workers of a process (not multiprocessing's resource tracker, which leaves by itself)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and "spawn_main" in stat.with_name("cmdline").read_text():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_indexers_do_not_outlive_a_parent_that_is_killed(tmp_path):
    shards = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for shard in shards:
        os.mkfifo(shard)  # reading it waits for ever
    script = tmp_path / "index.py"
    script.write_text(_INDEXES_FOR_EVER)
    parent = subprocess.Popen([sys.executable, str(script), *map(str, shards)])
    try:
        deadline = time.monotonic() + 60
        while len(workers := _children(parent.pid)) < 2:
            assert time.monotonic() < deadline, "the indexers never started"
            time.sleep(0.05)
        time.sleep(1.0)  # until they have said how they take their parent's death
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if _alive(pid)]
