"""Sequence parallelism: ranks that share rows train as one rank would that has them for itself."""

import json
from functools import partial

import pytest
from ranks import RankError, run_ranks
from test_distributed_equality import LIMIT, largest_difference, options
from tiny import train_cases
from tiny_run import make_data, train, write_config

from trichord.checkpoints.load import find_latest
from trichord.tracking.metrics import read_metrics

pytestmark = pytest.mark.distributed

STEPS = 6
four_heads = partial(train_cases, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def reference():
    """One rank, stage 0, the whole batch at once."""
    return run_ranks(1, four_heads, [(options(0), 8)], STEPS)[0][0]


def differences(cases, by_rank, reference):
    assert all(histories == by_rank[0] for histories in by_rank)
    found = {str(case): largest_difference(history, reference) for case, history in zip(cases, by_rank[0], strict=True)}
    print(found)
    return {case: value for case, value in found.items() if not value <= LIMIT}


def shared(size, stage, **more):
    return {**options(stage), "sequence_parallel": size, **more}


def test_two_ranks_that_share_rows_equal_one(reference):
    cases = [(shared(2, stage), micro_rows) for stage in (0, 1, 2, 3) for micro_rows in (8, 2)]
    cases += [
        (shared(2, 3, activation_checkpointing="full"), 2),
        (shared(2, 1, activation_checkpointing="selective"), 2),
    ]
    assert differences(cases, run_ranks(2, four_heads, cases, STEPS, timeout_s=280), reference) == {}


def test_four_ranks_in_groups_of_two_and_of_four_equal_one(reference):
    """A group of four has more ranks than the trunk has key heads."""
    cases = [(shared(size, stage), micro_rows) for size in (2, 4) for stage, micro_rows in ((1, 4), (3, 2))]
    assert differences(cases, run_ranks(4, four_heads, cases, STEPS, timeout_s=280), reference) == {}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With one sample that cannot be decoded."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    spoil_first_image(folder / "it-000.tar")
    return folder


def spoil_first_image(shard):
    """Noise in the place of the bytes of the first PNG, behind its signature."""
    content = bytearray(shard.read_bytes())
    start = content.index(b"\x89PNG") + 16
    content[start : start + 40] = b"\xa5" * 40
    shard.write_bytes(content)


def whole_run(data, root, ranks, size, *overrides):
    config = str(write_config(data, root))
    run_ranks(ranks, train, config, f"engine.sequence_parallel={size}", *overrides, timeout_s=200)
    return root / "tiny"


def last(folder):
    manifest = json.loads((find_latest(folder / "checkpoints") / "manifest.json").read_text())
    seen = json.loads((folder / "data.json").read_text())
    bad = sorted((row["shard"], row["key"]) for row in map(json.loads, (folder / "quarantine.jsonl").open()))
    return manifest["data_digest"], seen, bad


def losses(folder):
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


SETTINGS = (
    "tracking.preview_every_steps=5",
    "batches.num_workers=1",
    "samples.audio.mel=worker",
    "engine.schedule=constant",
)


def loss_weights(*weights):
    sources = zip(("it", "at", "iat"), weights, strict=True)
    return tuple(f"shards.sources.{name}.loss_weight={weight}" for name, weight in sources)


def test_a_run_counts_its_samples_once_and_goes_on_without_sharing(data, tmp_path):
    alone = whole_run(data, tmp_path / "alone", 1, 1, *SETTINGS, *loss_weights(1, 2, 1))
    settings = *SETTINGS, *loss_weights(1e-5, 2e-5, 1e-5)  # the loss is a mean by weight: the scale is nothing
    together = whole_run(data, tmp_path / "together", 2, 2, *settings, "run.max_steps=16")
    assert len(read_metrics(together)) == 16
    together = whole_run(data, tmp_path / "together", 2, 1, *settings)
    assert last(together) == last(alone)
    assert last(alone)[2], "no bad sample was met: the case does not cover it"
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    for name in ("train/samples_seen", "train/tokens_seen", "data/useful_tokens_frac"):
        assert [row.get(name) for row in read_metrics(together)] == [row.get(name) for row in read_metrics(alone)], name
    assert {path.name for path in (together / "previews").iterdir()} == {
        path.name for path in (alone / "previews").iterdir()
    }


@pytest.mark.parametrize(
    ("ranks", "overrides", "said"),
    [
        (2, ("engine.sequence_parallel=4", "fusion.trunk.num_heads=4"), "does not divide the 2 ranks"),
        (2, ("engine.sequence_parallel=2", "fusion.trunk.num_heads=1", "fusion.trunk.head_dim=16"), "attention heads"),
    ],
)
def test_what_cannot_be_shared_is_refused(data, tmp_path, ranks, overrides, said):
    config = str(write_config(data, tmp_path))
    with pytest.raises(RankError, match=said):
        run_ranks(ranks, train, config, *overrides, timeout_s=60)
