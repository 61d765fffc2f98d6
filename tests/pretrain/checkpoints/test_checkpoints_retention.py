"""Which checkpoints stay: the last, every m-th, the best by a metric; never none that is whole."""

import json

import pytest

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.hashes import file_facts
from trichord.checkpoints.retention import Retention, reasons_to_keep, why_kept

RECALL = "eval/scans/retrieval/image-text/R_at_1"


def config(**keys) -> CheckpointsConfig:
    return CheckpointsConfig.model_validate({"keep_last": 2, **keys})


def make(folder, step: int, settings: CheckpointsConfig, **metrics):
    """A checkpoint as far as retention looks at it."""
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    state = {"step": step, "metrics": metrics, "config": {"checkpoints": settings.model_dump(mode="json")}}
    (path / "train_state.json").write_text(json.dumps(state))
    files = {"train_state.json": file_facts(path / "train_state.json")}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return path


def steps_in(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, {500, 600}),
        ({"keep_every_steps": 200}, {200, 400, 500, 600}),
        ({"keep_best": {"metric": "m", "count": 2}}, {100, 300, 500, 600}),
        ({"keep_best": {"metric": "m", "mode": "max"}}, {400, 500, 600}),
        ({"keep_last": 1, "keep_every_steps": 300, "keep_best": {"metric": "m"}}, {100, 300, 600}),
    ],
)
def test_the_rules(keys, kept):
    scores = {100: 1.0, 200: 3.0, 300: 2.0, 400: 9.0, 500: None, 600: 5.0}
    reasons = reasons_to_keep(scores, config(**keys))
    assert set(reasons) == kept
    assert all(reasons.values())


@pytest.mark.parametrize("name", ["retrieval/image-text/R@1 (scans)", "eval/scans/retrieval/image-text/R@1", RECALL])
def test_a_metric_may_be_named_as_tables_show_it(name):
    assert config(keep_best={"metric": name}).keep_best.metric == RECALL


def test_reasons_are_said():
    reasons = reasons_to_keep({1: 0.5, 2: 0.25, 3: None}, config(keep_every_steps=2, keep_best={"metric": "eval/loss"}))
    assert reasons == {
        2: ["one of the last 2", "every 2 steps", "eval/loss 0.25, number 1 by min"],
        3: ["one of the last 2"],
    }
    assert reasons_to_keep({}, config()) == {}


def test_the_best_of_an_earlier_start_stays(tmp_path):
    """Scores are in the checkpoints themselves, so that a new process knows them."""
    settings = config(keep_last=1, keep_best={"metric": "train/loss"})
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        make(tmp_path, step, settings, **{"train/loss": loss})
        Retention(tmp_path, settings).apply(step)  # a new one each time: nothing is remembered in memory
    assert steps_in(tmp_path) == [2, 3]
    assert why_kept(tmp_path / "step-000002") == ["train/loss 1, number 1 by min"]
    make(tmp_path, 4, settings, **{"train/loss": 0.5})
    Retention(tmp_path, settings).apply(4)
    assert steps_in(tmp_path) == [4]


def test_a_step_that_is_saved_anew_is_judged_anew(tmp_path):
    settings = config(keep_last=1, keep_best={"metric": "m"})
    retention = Retention(tmp_path, settings)
    path = make(tmp_path, 1, settings, m=1.0)
    retention.apply(1)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    make(tmp_path, 1, settings, m=9.0)
    retention.apply(1)
    make(tmp_path, 2, settings, m=5.0)
    retention.apply(2)
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("value", [None, float("nan"), "1", True])
def test_what_is_no_number_is_never_the_best(tmp_path, value):
    settings = config(keep_last=1, keep_best={"metric": "m"})
    make(tmp_path, 1, settings, m=value)
    retention = Retention(tmp_path, settings)
    retention.apply(1)
    make(tmp_path, 2, settings)
    retention.apply(2)
    assert steps_in(tmp_path) == [2]


def test_the_last_whole_one_stays_whatever_is_newer(tmp_path):
    settings = config(keep_last=1)
    make(tmp_path, 1, settings)
    make(tmp_path, 2, settings)
    for step in (3, 4):
        (make(tmp_path, step, settings) / "train_state.json").write_text("")  # cut short: another size
    Retention(tmp_path, settings).apply(4)
    assert steps_in(tmp_path) == [2, 3, 4]
    make(tmp_path, 5, settings)
    Retention(tmp_path, settings).apply(5)
    assert steps_in(tmp_path) == [5], "what is broken and older than what is kept goes"


def test_without_one_that_is_whole_nothing_is_removed(tmp_path):
    settings = config(keep_last=1)
    for step in (1, 2):
        (make(tmp_path, step, settings) / "manifest.json").unlink()
    Retention(tmp_path, settings).apply(2)
    assert steps_in(tmp_path) == [1, 2]
