"""Losses of the first steps of a shipped config. A change that moves them says why in the same commit.

Made with: trichord quickstart --data-only, then trichord train debug/tiny.yaml run.max_steps=20 engine.zero_stage=0
"""

import subprocess
import sys
from pathlib import Path

import pytest

from trichord.tracking.metrics import read_metrics

GOLDEN = Path(__file__).parent / "debug_tiny_cpu.txt"


@pytest.mark.slow
def test_debug_tiny_has_the_losses_it_had(tmp_path):
    """1e-4 relative: other processors sum in another order; measured 0 on one, 1e-7 between 1 and 2 threads."""
    for arguments in (["quickstart", "--data-only"], ["train", "debug/tiny.yaml", "run.max_steps=20"]):
        command = [sys.executable, "-m", "trichord.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    losses = {row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "runs" / "tiny")}
    golden = dict(line.split() for line in GOLDEN.read_text().splitlines())
    assert {str(step) for step in losses} == set(golden)
    for step, loss in losses.items():
        assert loss == pytest.approx(float(golden[str(step)]), rel=1e-4), step
