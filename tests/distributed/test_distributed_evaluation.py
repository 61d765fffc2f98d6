"""Evaluation during training: the figures of `trichord evaluate`, and a training that does not notice."""

import json
import random
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import RankError, run_ranks
from tiny_run import WORDS, make_data, train, write_config

from trichord.checkpoints.load import load_weights
from trichord.checkpoints.manifest import checkpoint_name
from trichord.evaluate import evaluate
from trichord.evaluation.during import metric_names
from trichord.tracking.metrics import merge_steps, read_events, read_metrics
from trichord.tracking.previews import read_previews

pytestmark = pytest.mark.distributed

STEPS, EVERY = 8, 4
TASKS = (  # the last source has images and audio: what a caption is made of is one of them
    {"kind": "loss", "source": "it", "batch_samples": 16},
    {"kind": "retrieval", "source": "it", "pair": "image-text", "gallery": "iat", "batch_samples": 9},
    {"kind": "caption", "source": "it", "context": "image", "batch_samples": 9},
    {"kind": "caption", "source": "iat", "context": "audio", "batch_samples": 40},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data"))
    sources = [{"name": name, "shards": [f"{folder}/{name}-*.tar"]} for name in ("it", "iat")]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "some", "sources": sources, "tasks": list(TASKS)}))
    return folder


def random_states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def restless_train(config: str, *overrides: str) -> tuple[int, list[bool]]:
    """A run whose evaluations draw random numbers of every kind; whether each left these and the modes as they were."""
    import trichord.evaluate as story

    suite, after, same = story.run_suite, story.OnTheWay.after, []

    def drawing(*args):
        random.random(), np.random.rand(), torch.rand(3)
        return suite(*args)

    def watched(self, step, batch, **facts):
        modules = list(self.engine.modules())
        modules[-1].training = step % 2 == 0  # one that is not as the others are
        before = random_states(), [module.training for module in modules]
        after(self, step, batch, **facts)
        same.append((random_states(), [module.training for module in modules]) == before)

    story.run_suite, story.OnTheWay.after = drawing, watched
    return train(config, *overrides), same


def run(data: Path, root: Path, stage: int, evaluated: bool, *more: str) -> Path:
    config = str(write_config(data, root))
    words = [f"run.max_steps={STEPS}", f"engine.zero_stage={stage}", f"checkpoints.save_every_steps={EVERY}", *more]
    words += ["engine.heartbeat_timeout_s=30", "engine.lr=0.03", "checkpoints.keep_last=9"]
    if not evaluated:
        assert run_ranks(2, train, config, *words) == [0, 0]
        return root / "tiny"
    words.append(f"tracking.preview_every_steps={EVERY}")
    words.append(f"evaluation={{suite: {data}/suite.yaml, every_steps: {EVERY}, ema: {str(stage == 2).lower()}}}")
    best = "checkpoints.keep_best={metric: eval/it/loss/next_token, mode: min, count: 1}"
    for code, same in run_ranks(2, restless_train, config, *words, best):
        assert code == 0
        assert same == [True] * STEPS
    return root / "tiny"


@pytest.fixture(scope="module")
def at_stage_3(data, tmp_path_factory):
    """With evaluation."""
    return run(data, tmp_path_factory.mktemp("stage3"), 3, True)


@pytest.fixture(scope="module", params=[2, 3])
def pair(request, data, at_stage_3, tmp_path_factory):
    """Stage, and folders of the run without and with evaluation; at stage 2 that of the average of the weights."""
    root, stage = tmp_path_factory.mktemp("pair"), request.param
    average = ("engine.ema_decay=0.5",) if stage == 2 else ()
    plain = run(data, root / "plain", stage, False, *average)
    return stage, plain, at_stage_3 if stage == 3 else run(data, root / "evaluated", stage, True, *average)


def test_the_training_does_not_notice(pair):
    stage, plain, evaluated = pair
    lines = [merge_steps(read_metrics(folder)) for folder in (plain, evaluated)]
    assert len(lines[0]) == STEPS
    for one, two in zip(*lines, strict=True):
        names = [name for name in one if name.startswith("train/")]
        assert {name: one[name] for name in names} == {name: two[name] for name in names}
        if stage == 2:  # at stage 3 DeepSpeed's order of gathers is learned anew in the step after
            assert one["comm/wire_mib"] == two["comm/wire_mib"], "what evaluation sends is no step's"
    for step in range(EVERY, STEPS + 1, EVERY):
        one, two = (load_weights(folder / "checkpoints" / checkpoint_name(step)) for folder in (plain, evaluated))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_figures_are_those_of_evaluate(pair, data):
    """Of the same checkpoint, on one process, with captions that were generated token by token."""
    stage, _, folder = pair
    lines = {line["step"]: line for line in merge_steps(read_metrics(folder))}
    assert [step for step, line in lines.items() if "eval/time_s" in line] == [4, 8]
    checkpoint = folder / "checkpoints" / checkpoint_name(STEPS)
    expected = metric_names(evaluate(checkpoint, str(data / "suite.yaml"), ema=stage == 2)["metrics"])
    assert len(expected) == 5
    for name, value in expected.items():
        assert lines[STEPS][name] == pytest.approx(value, rel=1e-5), name
    if stage == 3:
        assert lines[STEPS]["eval/it/caption/image/exact_match"] > 0, "a comparison of zeros shows nothing"
    else:
        live = metric_names(evaluate(checkpoint, str(data / "suite.yaml"))["metrics"])
        assert abs(live["eval/it/loss/next_token"] / lines[STEPS]["eval/it/loss/next_token"] - 1) > 1e-4
    events = [event for event in read_events(folder) if event["kind"] == "evaluation"]
    assert [(event["step"], event["suite"]) for event in events] == [(4, "some"), (8, "some")]


def test_a_checkpoint_can_be_the_best_by_it(pair):
    _, _, folder = pair
    state = json.loads((folder / "checkpoints" / checkpoint_name(EVERY) / "train_state.json").read_text())
    line = next(line for line in merge_steps(read_metrics(folder)) if line["step"] == EVERY)
    assert state["metrics"]["eval/it/loss/next_token"] == line["eval/it/loss/next_token"]


def test_samples_of_a_step_are_kept_with_what_the_model_says(pair):
    from PIL import Image

    _, plain, folder = pair
    assert not read_previews(plain)
    lines = read_previews(folder)
    assert {line["step"] for line in lines} == {4, 8}
    assert {line["source"] for line in lines} <= {"it", "at", "iat"}
    for line in lines:
        assert line["wanted"] in WORDS
        assert (line["right_frac"] == 1.0) <= (line["predicted"] == line["wanted"]), "both tokens: the word and the end"
        assert len(line["images"]) == ("i" in line["source"])
        assert len(line["clips"]) == ("a" in line["source"])
        for name in line["images"]:
            assert Image.open(folder / name).size == (16, 16)
        for name in line["clips"]:
            with wave.open(str(folder / name)) as file:
                assert (file.getframerate(), file.getnchannels()) == (16000, 1)
                assert file.getnframes() >= 1600
    assert any(line["images"] for line in lines)
    assert any(line["clips"] for line in lines)


@pytest.mark.parametrize(
    ("stage", "more", "limit"),
    [
        (0, (), 1e-5),
        (1, (), 1e-5),
        (1, ("engine.precision=bf16",), 5e-2),
        (3, ("engine.sequence_parallel=2",), 1e-5),
    ],
    ids=["stage 0", "stage 1", "bf16", "rows shared"],
)
def test_stage_precision_and_shared_rows_change_no_figure(at_stage_3, data, tmp_path, stage, more, limit):
    """Ranks that share rows in training have batches of their own in an evaluation. Limits are relative."""
    folder = run(data, tmp_path, stage, True, *more)
    for ours, theirs in zip(*(merge_steps(read_metrics(of)) for of in (folder, at_stage_3)), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=limit)
        names = {name for name in theirs if name.startswith("eval/") and name != "eval/time_s"}
        assert bool(names) == (theirs["step"] % EVERY == 0)
        if "engine.precision=bf16" in more:  # among neighbours as near as rounding, another may be the nearest
            names = {name for name in names if "/retrieval/" not in name}
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=limit)
    ours, theirs = (
        {(line["step"], line["source"], line["epoch"], line["sample"]): line for line in read_previews(of)}
        for of in (folder, at_stage_3)
    )
    common = ours.keys() & theirs.keys()  # ranks that share rows show those of both
    assert {step for step, *_ in common} == {4, 8}
    if limit == 1e-5:
        for name in ("given", "wanted", "predicted", "right_frac"):
            assert {key: ours[key][name] for key in common} == {key: theirs[key][name] for key in common}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fusion={kind: none}", "objectives.next_token=null"), "needs a language model"),
        (("evaluation.suite=nowhere.yaml",), "nowhere.yaml: no such file"),
    ],
)
def test_a_suite_that_cannot_run_is_told_before_the_first_step(data, tmp_path, words, message):
    config = str(write_config(data, tmp_path))
    with pytest.raises(RankError, match=message):
        run_ranks(1, train, config, f"evaluation={{suite: {data}/suite.yaml, every_steps: 1}}", *words)
    assert not read_metrics(tmp_path / "tiny")
