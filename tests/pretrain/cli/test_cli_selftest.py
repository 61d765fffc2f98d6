"""`trichord selftest`: real runs killed with -9, resumed, and compared; and the comparison can fail."""

import json
import shutil

import pytest

from trichord.cli import main
from trichord.selftest.training import Split, Trial, chaos_cases, random_split, resume_cases

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def trial(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftest")
    shutil.copytree(tiny_world, folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "world")
        yield Trial("c.yaml", [], folder / "runs", steps=6, procs=2)


def test_killed_runs_go_on_as_if_nothing_had_been(trial, monkeypatch):
    monkeypatch.chdir(trial.folder.parent / "world")
    same, other = resume_cases(trial, Split(1, 2))
    assert (same.faults, other.faults) == ((), ())
    assert (same.state_equal, same.largest_difference, other.state_equal) == (True, 0.0, None)
    assert 0 < same.resumed_from < 6
    assert 0 < other.largest_difference < 1e-5, "another split adds up in another order"
    (case,) = chaos_cases(trial, 1, seed=0)
    assert case.faults == ()

    # The finished run is compared once more, with a record that says something else.
    lines = (trial.folder / "undisturbed" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    changed = json.dumps({**last, "train/loss": last["train/loss"] * (1 + 1e-4)})
    (trial.folder / "undisturbed" / "metrics.jsonl").write_text("\n".join([*lines[:-1], changed]) + "\n")
    shutil.rmtree(trial.folder / "killed" / "checkpoints" / "step-000006")
    found = trial.resume("killed", "again", trial.split)
    assert found.faults[0] == "not equal bit for bit on the same split"
    assert found.faults[1].startswith("losses differ by 1.0e-04, allowed 1e-05")


def test_mistakes_are_told_before_anything_is_trained(trial, monkeypatch, capsys):
    monkeypatch.chdir(trial.folder.parent / "world")
    assert main(["selftest", "resume", "c.yaml", "--steps", "2"]) == 2
    assert "at least 4" in capsys.readouterr().err
    assert main(["selftest", "chaos", "c.yaml", "--procs", "0"]) == 2
    assert main(["selftest", "chaos", "none.yaml"]) == 2
    assert main(["selftest", "resume", "c.yaml", "--work", "shards"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_splits_differ_and_are_allowed(trial):
    class Always:
        def choice(self, options):
            self.options = options
            return options[0]

    rng = Always()
    random_split(trial, rng)  # pyright: ignore[reportArgumentType]
    assert trial.split not in rng.options
    assert {split.stage for split in rng.options} == {0, 1, 2, 3}
    assert {split.procs for split in rng.options} == {1, 2, 3}
