"""`trichord provenance --replay` and `--data-only`: a step of two ranks, done again by one process."""

import json
from itertools import islice

import pytest
from ranks import run_ranks
from tiny_run import make_data, train, write_config

from trichord.batches.loader import Loader
from trichord.config.identity import read_run_config
from trichord.replay import rebuild_batch, replay_step
from trichord.restore import item_lengths

pytestmark = pytest.mark.distributed

STEPS = 7
LIMIT = 1e-5  # relative, fp32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained on 2 ranks at stage 2, with checkpoints every 3 steps."""
    root = tmp_path_factory.mktemp("runs")
    config = write_config(make_data(tmp_path_factory.mktemp("data")), root)
    words = ("run.name=past", f"run.max_steps={STEPS}", "checkpoints.save_every_steps=3", "engine.zero_stage=2")
    assert run_ranks(2, train, str(config), *words) == [0, 0]
    return root / "past"


@pytest.fixture(scope="module")
def run_that_shares_rows(run):
    """The same, two ranks at each row."""
    words = ("run.name=shared", f"run.max_steps={STEPS}", "checkpoints.save_every_steps=3")
    config = str(run.parent / "config.yaml")
    assert run_ranks(2, train, config, *words, "engine.sequence_parallel=2") == [0, 0]
    return run.parent / "shared"


def recorded(run, step):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == step)


def replayed(run, step):
    """In a process of its own: a replay starts a process group."""
    return run_ranks(1, replay_step, run, step)[0]


@pytest.mark.parametrize(("step", "checkpoint"), [(4, 3), (6, 3), (2, 0)])
def test_the_loss_of_a_past_step_comes_out_again(run, step, checkpoint):
    found = replayed(run, step)
    assert found.replayed_from == checkpoint
    assert found.recorded_loss == recorded(run, step)["train/loss"]
    assert found.difference <= LIMIT
    assert found.grad_norm == pytest.approx(found.recorded_grad_norm, rel=LIMIT)
    assert found.loss != pytest.approx(recorded(run, step + 1)["train/loss"], rel=LIMIT), "any step would have passed"


def test_the_batch_alone_is_that_of_the_run(run):
    config = read_run_config(run)
    loader = Loader(config.shards, config.samples, config.batches, seed=config.run.seed, lengths=item_lengths(config))
    batches = list(islice(loader, 6))
    found = rebuild_batch(run, 6)
    assert (found.samples, found.useful_tokens) == (batches[5].stats.samples, batches[5].stats.useful_tokens)
    assert found == rebuild_batch(run, 6)
    assert found.digest != rebuild_batch(run, 5).digest


def test_one_process_does_a_step_of_ranks_that_shared_rows(run, run_that_shares_rows):
    assert replayed(run_that_shares_rows, 4).difference <= LIMIT
    assert rebuild_batch(run_that_shares_rows, 6).digest == rebuild_batch(run, 6).digest
