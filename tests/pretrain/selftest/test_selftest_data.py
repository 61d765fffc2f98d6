"""The proof of order in its short form; and that it would notice a sample lost, doubled or let through."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from trichord.selftest import data as proof
from trichord.selftest import stretches
from trichord.selftest.mixture import build_mixture
from trichord.shards.index import build_index


@pytest.mark.slow
def test_mixture_with_stops_is_the_mixture_undisturbed():
    report = proof.prove(2000, 5, seed=1)
    assert report["faults"] == []
    assert report["stops"] == 5
    assert {leg["world_size"] for leg in report["stretches"]} == {1, 2, 3, 4, 6, 8}
    assert report["digest"] == report["digest_with_stops"]
    assert report["quarantine_digest"] == report["quarantine_digest_with_stops"]


@pytest.mark.slow
def test_verb_names_each_stretch_and_says_that_nothing_differs(tmp_path):
    command = [sys.executable, "-m", "trichord.cli", "data", "selftest", "--samples", "500", "--stops", "2"]
    command += ["--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stretch 3: steps" in done.stdout
    assert "every good sample came exactly once per epoch" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["faults"] == []


def test_small_mixture_with_stops_in_one_process(monkeypatch):
    monkeypatch.setattr(proof, "MAX_WORKERS", 0)
    report = proof.prove(500, 3, seed=2)
    assert report["faults"] == []
    assert report["bad_draws"] > 5


def test_planted_samples_are_bad_early_and_late(tmp_path):
    mixture = build_mixture(tmp_path, 1500, 0)
    for source, kind in ((1, "image"), (2, "audio")):
        index = build_index(str(tmp_path / f"{mixture.shards.sources[source].name}-0000.tar"))
        problems = [index.entry(int(sample)).problem for sample in mixture.bad[source]]
        assert any(problem is None for problem in problems), kind
        assert any(problem is not None for problem in problems), kind


def spoiled(change):
    """`run_stretch` with what came in it changed."""
    run = stretches.run_stretch

    def instead(*args, **options):
        state, seen = run(*args, **options)
        seen.refs = change(seen.refs)
        return state, seen

    return instead


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda refs: refs[1:], "good samples never came"),
        (lambda refs: [*refs, refs[0]], "came more than once"),
        (lambda refs: [*refs, np.array([[0, 7, 0]])], "1 others did"),
    ],
)
def test_sample_lost_doubled_or_let_through_is_a_fault(change, said, monkeypatch):
    monkeypatch.setattr(proof, "MAX_WORKERS", 0)
    monkeypatch.setattr(proof, "run_stretch", spoiled(change))
    report = proof.prove(500, 1, seed=2)
    assert any(said in fault for fault in report["faults"])


@pytest.mark.slow
def test_another_end_is_a_fault(monkeypatch):
    monkeypatch.setattr(proof, "MAX_WORKERS", 0)
    run = stretches.run_stretch

    def other_order(mixture, seed, shape, start, steps, wasted=0):
        state, seen = run(mixture, seed, shape, start, steps, wasted)
        lanes = {lane: replace(cursor, chain="1" * 32) for lane, cursor in state.lanes.items()}
        return (state if steps is None else replace(state, lanes=lanes)), seen

    monkeypatch.setattr(proof, "run_stretch", other_order)
    assert any(fault.startswith("digest undisturbed") for fault in proof.prove(500, 1, seed=2)["faults"])
