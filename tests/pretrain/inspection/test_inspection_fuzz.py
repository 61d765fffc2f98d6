"""The attack itself: it ends well on what stands, and it notices what it is there to notice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trichord.cli import main
from trichord.core.errors import DataError
from trichord.inspection.fuzz import child, road
from trichord.inspection.fuzz.campaign import run_campaign
from trichord.inspection.fuzz.case import make_case, write_case
from trichord.inspection.fuzz.road import Outcome


def test_a_few_cases_end_in_samples_quarantine_or_a_message(tmp_path):
    report = run_campaign(40, seed=3, out=tmp_path / "findings")
    assert report.findings == []
    assert report.cases == 40
    assert report.outcomes.keys() <= {"samples", "left out", "refused"}
    assert len(report.outcomes) == 3
    assert json.loads(json.dumps(report.to_json()))["outcomes"] == report.outcomes
    assert {row["kind of fault"] for row in report.rows()} == report.families.keys()


@pytest.mark.slow
def test_many_cases_end_in_samples_quarantine_or_a_message(tmp_path):
    report = run_campaign(300, seed=4, workers=2, out=tmp_path / "findings")
    assert report.findings == []
    assert report.cases == 300
    inherited = psutil.Process().memory_info().rss / 2**20  # its processes are forks of this one
    assert report.peak_mib < inherited + 1200


@pytest.mark.slow
def test_verb_prints_a_table_and_writes_what_it_counted(tmp_path):
    command = [sys.executable, "-m", "trichord.cli", "data", "fuzz", "--cases", "3", "--workers", "1"]
    command += ["--out", str(tmp_path / "findings"), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 cases in" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["cases"] == 3
    assert json.loads((tmp_path / "findings" / "report.json").read_text())["next_case"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_campaign_that_is_stopped_leaves_no_process_and_says_how_far_it_got(tmp_path, number):
    out = tmp_path / "findings"
    command = [sys.executable, "-m", "trichord.cli", "data", "fuzz", "--cases", "100000", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    parent = psutil.Process(process.pid)
    while len(children := parent.children()) < 2 or not all(ignores_sigterm(child.pid) for child in children):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert out.is_dir()
    if number == signal.SIGKILL:
        return
    assert process.returncode == 128 + number
    assert re.search(
        r"^stopped after \d+ of 100000 cases with \d+ findings, .* --first \d+ --cases \d+ does the rest", said, re.M
    )
    assert json.loads((out / "report.json").read_text())["seed"] == 0
    assert not list(tmp_path.glob("trichord-fuzz-*"))


def ignores_sigterm(pid: int) -> bool:
    """Whether a child has got as far as to have said so."""
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = re.search(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)
    return ignored is not None and bool(int(ignored[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_folder_for_findings_that_cannot_be_made_is_told_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "fuzz", "--cases", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_case_is_a_pure_function_of_seed_and_number(tmp_path):
    assert make_case(1, 12) == make_case(1, 12)
    assert make_case(1, 12).shard != make_case(2, 12).shard
    sidecars = next(case for case in (make_case(1, number) for number in range(200)) if case.sidecar_seed is not None)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_case(sidecars, tmp_path / folder)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}


def planted(monkeypatch, act):
    """`act` runs in place of the road of every case but the first of a process, which is that of valid samples."""
    drive = road.drive

    def instead(url, *rest):
        return act(url) if "case" in url and planted.ready(url) else drive(url, *rest)

    seen = {}
    planted.ready = lambda url: seen.setdefault(os.getpid(), []).append(url) or len(seen[os.getpid()]) > 2
    monkeypatch.setattr(child, "drive", instead)


def crash(url):
    os.abort()


def hang(url):
    time.sleep(60)


def write_elsewhere(url):
    Path("/tmp/written-by-a-case").write_text("x")


def write_beside(url):
    Path(url).with_name("surprise.txt").write_text("x")
    return Outcome("samples")


def read_secret(url):
    return Outcome("samples", detail=Path("/etc/passwd").read_text()[:5])


def start_process(url):
    subprocess.run(["true"])


def grow(url):
    return Outcome("samples", detail=str(len(bytearray(3 * 2**30))))


def differ(url):
    return Outcome("samples", detail=str(time.monotonic_ns()))


def unclear(url):
    raise KeyError("x")


def refuse(url):
    raise DataError("this is never raised through: the road turns it into an outcome")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (crash, "killed by SIGABRT"),
        (write_elsewhere, "reached outside: open '/tmp/written-by-a-case' for writing"),
        (write_beside, "files that nobody asked for: ['case/"),
        (read_secret, "reached outside: open '/etc/passwd' for reading"),
        (start_process, "reached outside: subprocess.Popen"),
        (grow, "MemoryError"),
        (differ, "the second reading differs"),
        (unclear, "KeyError: 'x'"),
        (refuse, "DataError"),
    ],
)
def test_what_a_case_must_not_do_is_a_finding(act, said, monkeypatch, tmp_path):
    planted(monkeypatch, act)
    report = run_campaign(1, seed=5, out=tmp_path)
    assert len(report.findings) == 1
    assert said in report.findings[0]["fault"]
    saved = json.loads((tmp_path / "seed5-case0" / "finding.json").read_text())
    assert saved["fault"] == report.findings[0]["fault"]
    assert list((tmp_path / "seed5-case0").glob("shard*"))
    assert not Path("/tmp/written-by-a-case").exists()


def test_case_that_hangs_is_ended_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr("trichord.inspection.fuzz.campaign._HANG_SECONDS", 0.5)
    monkeypatch.setattr("trichord.inspection.fuzz.campaign._TRIES", 1)
    planted(monkeypatch, hang)
    report = run_campaign(1, seed=5)
    assert "hung" in report.findings[0]["fault"]


def test_slow_case_is_tried_again_before_it_is_a_finding(monkeypatch):
    monkeypatch.setattr("trichord.inspection.fuzz.campaign.MAX_SECONDS", 0.05)
    calls = []

    def slow(url):
        calls.append(url)
        time.sleep(0.1)
        return Outcome("samples")

    planted(monkeypatch, slow)
    report = run_campaign(1, seed=5)
    assert "took 0.1 s" in report.findings[0]["fault"]
