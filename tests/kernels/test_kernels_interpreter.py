"""Runs the interpreted kernel tests in a process of their own, once, and passes their verdict on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_interpreted_kernels(file, tmp_path, record_property) -> None:
    """Prints the number of cases and the worst error, as a multiple of the torch path's error or the floor.

    A file says by `LEAST_CASES = N` how many it has, so that cases cannot go missing in silence.
    """
    declared = re.search(r"^LEAST_CASES = (\d+)", (HERE / file).read_text(), re.M)
    assert declared is not None, f"{file} declares no LEAST_CASES"
    least_cases = int(declared.group(1))
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRICHORD_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    ratios = [float(p.get("value", "")) for p in suite.iter("property") if p.get("name") == "worst_error_ratio"]
    passed = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    assert passed >= least_cases, f"expected at least {least_cases} interpreted cases, got {passed}"
    record_property("interpreted_cases", passed)
    record_property("worst_error_ratio", max(ratios))
    print(f"{file}: {passed} cases, worst error ratio {max(ratios):.2f}")
