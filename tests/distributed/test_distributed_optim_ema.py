"""The average of weights: what it is, where it lies, and that it survives any change of split."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ranks import run_ranks
from test_distributed_checkpoint import engine_config, live_state, loader_state, round_trip, whole

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.doctor import examine, worst
from trichord.checkpoints.load import find_latest, load_into, load_weights
from trichord.checkpoints.save import CheckpointSaver
from trichord.core.errors import CheckpointError
from trichord.engine.masters import masters

pytestmark = pytest.mark.distributed

DECAY = 0.75
STEPS = 3


def follow(stages: tuple[int, ...]):
    """Rank entry. For each stage: is the average what the masters' history says, to the bit?; and the state held."""
    found = []
    for stage in stages:
        config = engine_config(stage, {"ema_decay": DECAY, "optimizer": "sgd"})  # Adam makes much of rounding
        facts, engine, stepper = tiny.make_stepper(config, 1)
        expected = [master.detach().clone() for master in masters(engine)]
        for step in range(STEPS):
            if step == 1:
                spoil(engine)
            tiny.train_steps(facts, engine, stepper, config, 1, range(step, step + 1))
            if step != 1:  # whose update was not applied
                expected = [e.lerp(m.detach(), 1 - DECAY) for e, m in zip(expected, masters(engine))]
        equal = all(torch.equal(e, t) for e, t in zip(expected, engine.weight_average.tensors, strict=True))
        moved = any(not torch.equal(m, t) for m, t in zip(masters(engine), engine.weight_average.tensors))
        found.append((equal, moved, live_state(engine)))
        engine.destroy()
    return found


def spoil(engine):
    """The next backward pass brings a gradient that is not finite."""
    backward = engine.backward

    def broken(loss, **options):
        engine.backward = backward
        backward(loss * float("nan"), **options)

    engine.backward = broken


def test_the_average_follows_the_weights_on_any_split():
    stages = (0, 1, 2, 3)
    alone, by_rank = run_ranks(1, follow, stages), run_ranks(2, follow, stages)
    for equal, moved, _ in [*alone[0], *by_rank[0], *by_rank[1]]:
        assert equal
        assert moved
    reference = whole([alone[0][0][2]])
    averages = {name: value for (name, kind), value in reference.items() if kind == "ema"}
    assert len(averages) == len({name for name, _ in reference})
    for number in range(len(stages)):
        split = whole([by_rank[0][number][2], by_rank[1][number][2]])
        for name, value in averages.items():
            assert np.allclose(split[name, "ema"], value, rtol=1e-5, atol=1e-6), (stages[number], name)


def test_the_average_goes_on_from_a_checkpoint_on_another_split(tmp_path):
    kinds = {"param", "exp_avg", "exp_avg_sq", "ema"}
    round_trip(tmp_path, (2, 1), [(2, 1), (1, 3)], {"ema_decay": DECAY}, kinds)
    folder = find_latest(tmp_path)
    assert worst([f for f in examine(folder, "no model") if f.check in ("coverage", "values", "slices")]) == "pass"
    average, weights = load_weights(folder, ema=True), load_weights(folder)
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def save_with(folder: str, options: dict):
    config = engine_config(1, options)
    facts, engine, stepper = tiny.make_stepper(config, 8)
    tiny.train_steps(facts, engine, stepper, config, 8, range(2))
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
    saver.begin(engine, 2, {"progress": {}}, loader_state(2))
    assert saver.finish()


def resume_with(folder: str, options: dict):
    """The log of a resume, and how far the average lies from the weights."""
    _, engine, _ = tiny.make_stepper(engine_config(2, options), 8)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("trichord.checkpoints.load")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    load_into(engine, find_latest(Path(folder)))
    average = engine.weight_average
    far = None if average is None else max(float((t - m).abs().max()) for t, m in zip(average.tensors, masters(engine)))
    return messages, far


def test_an_average_that_is_turned_on_starts_from_the_weights_and_one_that_is_turned_off_ends(tmp_path):
    run_ranks(1, save_with, str(tmp_path), {})
    (messages, far), *_ = run_ranks(1, resume_with, str(tmp_path), {"ema_decay": DECAY})
    assert far == 0.0
    assert any("starts one from its weights" in message for message in messages)
    with pytest.raises(CheckpointError, match=r"its run had no engine\.ema_decay"):
        load_weights(find_latest(tmp_path), ema=True)
    run_ranks(1, save_with, str(tmp_path), {"ema_decay": DECAY})
    (messages, far), *_ = run_ranks(1, resume_with, str(tmp_path), {})
    assert far is None
    assert any("ends here: engine.ema_decay is not set" in message for message in messages)
