"""`trichord bench checkpoint` measures what it says; a small state, no bar."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.distributed


def bench(folder: str):
    from pathlib import Path

    from trichord.benchmarks.checkpoint import bench_checkpoint

    return bench_checkpoint(Path(folder), state_gb=0.3, rounds=2)


def test_a_small_state_is_saved_written_and_compared(tmp_path):
    (result,) = run_ranks(1, bench, str(tmp_path))
    assert result["state"]["bytes"] == pytest.approx(0.3e9, rel=0.05)
    seconds = result["seconds"]
    assert all(len(values) == 2 for values in seconds.values())
    for name in ("step", "save", "blocking", "hashed", "plain"):
        assert min(seconds[name]) > 0, name
    stall, rate = result["targets"]
    blocking, plain, hashed = (sum(seconds[name]) for name in ("blocking", "plain", "hashed"))
    assert stall["value"] == pytest.approx(sum(seconds["stall"]) / blocking)
    assert rate["value"] == pytest.approx(plain / hashed)
    assert [path.name for path in tmp_path.iterdir()] == [], "nothing is left behind"
