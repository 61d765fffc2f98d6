"""`trichord selftest`: real runs killed with -9, resumed, and compared; and the comparison can fail."""

import json
import random
import shutil

import pytest

from trichord.cli import main
from trichord.selftest import epochs, training
from trichord.selftest.epochs import read_epochs
from trichord.selftest.kills import InSave, chaos_cases, kill_at_random, random_split, resume_cases, to_json
from trichord.selftest.training import Split, Spread, Trial

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]


TRUNK = "{family: llama, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1}"
LANGUAGE = (f"fusion={{kind: interleave, trunk: {TRUNK}}}", "objectives.next_token={}")  # its rows can be shared


@pytest.fixture(scope="module")
def trial(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftest")
    shutil.copytree(tiny_world, folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "world")
        yield Trial("c.yaml", LANGUAGE, folder / "runs", steps=6, procs=2)


def test_killed_runs_go_on_as_if_nothing_had_been(trial, monkeypatch):
    monkeypatch.chdir(trial.folder.parent / "world")
    same, other = resume_cases(trial, Split(2, 2, shared=2))
    assert (same.faults, other.faults) == ((), ())
    assert (same.state_equal, same.largest_difference, other.state_equal) == (True, 0.0, None)
    assert 0 < same.resumed_from < 6
    assert 0 < other.largest_difference < 1e-5, "another split adds up in another order"
    first = trial.final("undisturbed")
    monkeypatch.setattr(trial, "spread", Spread({0: first, 1: first + 0.1, 2: first + 0.2}, trial.tolerance))
    (case,) = chaos_cases(trial, 1, seed=0)
    assert case.faults == ()
    assert "in the save of step" in case.how
    assert case.in_spread
    assert to_json(trial, [case], read_epochs(trial.folder / "undisturbed"))["passed"]

    # The finished run is compared once more, with a record that says something else.
    lines = (trial.folder / "undisturbed" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    changed = json.dumps({**last, "train/loss": last["train/loss"] * (1 + 1e-4)})
    (trial.folder / "undisturbed" / "metrics.jsonl").write_text("\n".join([*lines[:-1], changed]) + "\n")
    last = trial.folder / "killed" / "checkpoints" / "step-000006"
    last.rename(aside := trial.folder / "aside")
    monkeypatch.setattr(training, "train_by_launcher", lambda *_: aside.rename(last))
    monkeypatch.setattr(trial, "spread", Spread({0: first + 0.1, 1: first + 0.2, 2: first + 0.3}, trial.tolerance))
    found = trial.resume("killed", "again", trial.split)
    assert found.faults[0] == "not equal bit for bit on the same split"
    assert found.faults[1].startswith("losses differ by 1.0e-04, allowed 1e-05")
    assert found.faults[2].endswith("outside the spread of the seeds")
    assert not to_json(trial, [found])["passed"]


def test_mistakes_are_told_before_anything_is_trained(trial, monkeypatch, capsys):
    monkeypatch.chdir(trial.folder.parent / "world")
    assert main(["selftest", "resume", "c.yaml", "--steps", "2"]) == 2
    assert "at least 4" in capsys.readouterr().err
    assert main(["selftest", "chaos", "c.yaml", "--procs", "0"]) == 2
    assert main(["selftest", "chaos", "none.yaml"]) == 2
    assert main(["selftest", "chaos", "c.yaml", "--seeds", "1"]) == 2
    assert main(["selftest", "resume", "c.yaml", "--work", "shards"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_splits_differ_and_are_allowed(trial):
    class Always:
        def choice(self, options):
            self.options = options
            return options[0]

        def randint(self, low, high):
            return high

    rng = Always()
    other = random_split(trial, rng)  # pyright: ignore[reportArgumentType]
    assert other.workers == 2
    assert trial.split not in rng.options
    assert {split.stage for split in rng.options} == {0, 1, 2, 3}
    assert {(split.procs, split.shared) for split in rng.options} == {(1, 1), (2, 1), (2, 2), (3, 1)}


def test_a_run_that_was_done_when_it_was_killed_is_killed_again_sooner(tmp_path):
    class Started:
        """A trial whose first run has its last checkpoint when it is killed."""

        folder, split, steps, every, seconds, kills = tmp_path, Split(2, 0), 10, 2, 100.0, 0

        def kill_at(self, name, moment, rank):
            self.kills += 1
            return True

        def newest_step(self, name):
            return 10 if self.kills == 1 else 8

    trial = Started()
    how = kill_at_random(trial, "killed", "step", random.Random(0))  # pyright: ignore[reportArgumentType]
    assert " past step " in how
    assert trial.kills == 2


def test_spread_is_from_the_lowest_to_the_highest_seed_and_no_wider():
    spread = Spread({0: 2.0, 1: 1.0, 2: 3.0}, 1e-3)
    assert [value in spread for value in (1.0, 3.0, 0.9999, 3.0001)] == [True, True, False, False]
    lowest = Spread({0: 1.0, 1: 2.0}, 1e-3)  # the undisturbed run itself: its rounding
    assert [value in lowest for value in (0.9991, 0.9989, 2.0, 2.0001)] == [True, False, True, False]


def test_a_save_is_a_folder_that_is_being_filled(tmp_path):
    moment = InSave(tmp_path, 4, 0.0)
    for name in ("step-000004", "step-000002.partial-1-ab", "step-000004.partial-removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert not moment.holds()
    (tmp_path / "checkpoints" / "step-000006.partial-1-ab").mkdir()
    assert moment.holds()
    assert moment.told == "in the save of step 6"


def test_samples_of_a_run_are_counted(finished_world, tmp_path, monkeypatch):
    monkeypatch.chdir(finished_world)
    run = tmp_path / "demo"
    shutil.copytree(finished_world / "runs" / "demo", run)
    found = read_epochs(run)
    assert found.faults == ()
    (complete,) = found.epochs_checked.values()
    assert complete >= 1
    assert found.uses_checked >= 16 * complete

    class Twice(epochs.LaneReader):
        """Gives one sample in the place of another."""

        def next_row(self, step):
            row = super().next_row(step)
            row.samples[-1:] = row.samples[:1]
            return row

    class Skips(epochs.LaneReader):
        """Gives every second row."""

        def next_row(self, step):
            super().next_row(step)
            return super().next_row(step)

    told = {}
    for reader in (Twice, Skips):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(epochs, "LaneReader", reader)
            told[reader] = " ".join(read_epochs(run).faults)
    assert "came 2 times in epoch 0" in told[Twice]
    assert "did not come in epoch 0" in told[Twice]
    assert "does not reach the digests" in told[Skips]

    data = json.loads((run / "data.json").read_text())
    data["samples_per_source"] = {name: count + 1 for name, count in data["samples_per_source"].items()}
    (run / "data.json").write_text(json.dumps(data))
    assert "batches held" in " ".join(read_epochs(run).faults)
