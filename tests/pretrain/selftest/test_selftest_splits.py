"""The splits that a killed run may go on with."""

import random
from types import SimpleNamespace

import pytest

from trichord.fusion.config import TrunkConfig
from trichord.selftest.kills import random_split, ways_to_share
from trichord.selftest.training import Split


def config(trunk=None, *, row_tokens=48, shared=1, compiled=False):
    return SimpleNamespace(
        fusion=SimpleNamespace(trunk=trunk),
        engine=SimpleNamespace(sequence_parallel=shared, compile=compiled, precision="fp32", offload="none"),
        batches=SimpleNamespace(micro_rows=1, row_tokens=row_tokens),
    )


class Tried:
    """What `random_split` looks at of a trial."""

    split = Split(2, 1, workers=1)

    def __init__(self, of):
        self.config = of


def trunk(heads=8, key_heads=2, weights=None):
    return TrunkConfig(hidden_size=96, num_heads=heads, num_kv_heads=key_heads, weights=weights)


@pytest.mark.parametrize(
    ("of", "procs", "sizes"),
    [
        (config(trunk()), 8, [1, 2, 4, 8]),
        (config(trunk()), 6, [1, 2]),  # 3 and 6 divide no heads
        (config(trunk(), row_tokens=6), 8, [1, 2]),
        (config(trunk(12, 4)), 6, [1, 2]),  # 3 and 6 divide the heads, but neither the key heads nor these them
        (config(trunk(), compiled=True), 4, [1]),
        (config(), 4, [1]),
        (config(trunk(weights="hub/model@1")), 4, [1]),  # its heads are its own
        (config(trunk(weights="hub/model@1"), shared=2), 4, [1, 2]),
    ],
)
def test_rows_are_shared_only_as_the_model_allows(of, procs, sizes):
    assert ways_to_share(of, procs) == sizes


def test_a_split_that_differs_in_shared_rows_alone_is_another():
    trial = Tried(config(trunk()))
    drawn = {random_split(trial, random.Random(seed)) for seed in range(300)}  # pyright: ignore[reportArgumentType]
    assert {(split.procs, split.shared) for split in drawn} == {(1, 1), (2, 1), (2, 2), (3, 1)}
    assert any(split.shared == 2 and split.stage == 1 for split in drawn)
    assert not any((split.procs, split.stage, split.shared) == (2, 1, 1) for split in drawn)
    assert str(Split(2, 3, 0, 2)) == "2 ranks, stage 3, 0 workers, rows shared by 2"
