"""Model states and row splits: pure arithmetic, against the paper's own numbers and a brute-force count."""

import pytest

from trichord.engine.config import EngineConfig
from trichord.planning.memory import checkpoint_bytes, model_states
from trichord.planning.rows import RowSplit
from trichord.planning.zero import Parameter, Zero

LARGE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def parameters(trainable, frozen=0, pieces=1):
    """`trainable` elements in so many parameters, `frozen` in one."""
    sizes = [(trainable // pieces, True)] * pieces + [(frozen, False)]
    return [Parameter("trunk", size, trains, 1, True, True, True) for size, trains in sizes if size]


def states_of(trainable, frozen=0, *, ranks=1, **engine):
    if engine["zero_stage"] == 3:
        engine.setdefault("deepspeed", LARGE)
    config = EngineConfig(**engine)
    # At stage 3 every parameter is split by itself, below it their line is, at the border of one.
    pieces = 10 * ranks if engine["zero_stage"] < 3 and trainable % (10 * ranks) == 0 else 1
    return model_states(parameters(trainable, frozen, pieces), config, Zero.of(config, ranks))


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage, gigabytes):
    """Psi = 7.5 B, N = 64, K = 12: 120 GB on each GPU without ZeRO, then these; at stage 1 gradients are whole until
    they are reduced."""
    states = states_of(7_500_000_000, zero_stage=stage, precision="bf16", ranks=64)
    buckets = 2 * 500_000_000 * (2 if stage == 2 else 1)
    whole = states.backward - buckets - states.gradients if stage == 1 else 0
    assert (states.held + whole) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_without_zero_every_rank_has_all():
    assert states_of(1000, zero_stage=0, precision="autocast_bf16", ranks=8).in_backward == 16_000
    assert states_of(1000, zero_stage=1, precision="bf16").held == 16_000


def test_fp32_with_zero_has_a_master_of_its_own():
    states = states_of(1000, zero_stage=2, precision="fp32", ranks=10)
    assert (states.weights, states.gradients, states.master, states.moments) == (4000, 400, 400, 800)


def test_frozen_parameters_are_weights_only():
    for stage, weights in ((1, 2 * 1500), (2, 2 * 1500), (3, 2 * 150)):
        states = states_of(500, 1000, zero_stage=stage, precision="bf16", ranks=10)
        assert states.weights == weights
        assert (states.master, states.moments) == (200, 400)


@pytest.mark.parametrize(
    ("engine", "bytes_per_element"),
    [
        ({"optimizer": "adamw"}, 8),
        ({"optimizer": "adamw", "optimizer_states": "bf16"}, 4),
        ({"optimizer": "sgd"}, 4),
        ({"optimizer": "sgd", "momentum": 0.0}, 0),
        ({"optimizer": "rmsprop", "momentum": 0.0}, 4),
        ({"optimizer": "rmsprop", "momentum": 0.9}, 8),
    ],
)
def test_each_optimizer_has_its_states(engine, bytes_per_element):
    states = states_of(1000, zero_stage=1, precision="bf16", ranks=10, **engine)
    assert states.moments == 100 * bytes_per_element
    config = EngineConfig(zero_stage=1, **engine)
    assert checkpoint_bytes(parameters(1000), config) == (4 + bytes_per_element) * 1000


def test_an_average_of_the_weights_is_one_more_copy():
    states = states_of(1000, zero_stage=2, precision="bf16", ranks=10, ema_decay=0.999)
    assert states.average == 400
    assert checkpoint_bytes(parameters(1000), EngineConfig(ema_decay=0.999)) == 16 * 1000


def test_offload_moves_states_to_the_host():
    on_device = states_of(1000, zero_stage=2, precision="bf16", ranks=10)
    offloaded = states_of(1000, zero_stage=2, precision="bf16", ranks=10, offload="optimizer")
    assert (offloaded.master, offloaded.moments, offloaded.gradients, offloaded.update) == (0, 0, 0, 0)
    assert offloaded.host == on_device.master + on_device.moments + 400
    everything = states_of(1000, zero_stage=3, precision="bf16", ranks=10, offload="all")
    assert (everything.weights, everything.host) == (0, 1200 + 400 + 200)


def test_gradients_are_kept_whole_where_a_partition_touches_them():
    """Measured: 4 parameters on 2 ranks, the border inside the second, which both keep."""
    config = EngineConfig(zero_stage=2, precision="fp32")
    line = [Parameter("trunk", size, True, 1, True, True, True) for size in (10, 60, 20, 30)]
    zero = Zero.of(config, 2)
    assert [zero.gradient_elements(line, rank) for rank in (0, 1)] == [70, 110]
    assert zero.gradient_elements(line) == 110
    assert zero.own(line) == 60


def test_partitions_are_rounded_up():
    assert states_of(1001, zero_stage=3, precision="bf16", ranks=10).weights == 2 * 101


def test_small_weights_stay_whole_beside_their_partition():
    small = states_of(1000, zero_stage=3, precision="bf16", ranks=10, deepspeed={"zero_optimization": {}})
    assert (small.weights, small.gathered) == (2 * (100 + 1000), 2 * 50_000_000 * 0)


def test_buckets_have_their_configured_size_and_gathering_has_a_limit():
    small = states_of(1000, zero_stage=2, precision="bf16")
    assert small.backward == 2 * 2 * 500_000_000, "two where gradients are reduced during the backward pass"
    large = states_of(10**10, zero_stage=3, precision="bf16", ranks=64)
    assert large.backward == 2 * 500_000_000
    assert large.gathered == 2 * 10**10, "one parameter cannot be gathered by halves"


def test_a_checkpoint_holds_everything_once():
    assert checkpoint_bytes(parameters(100, 10), EngineConfig()) == 12 * 100 + 4 * 10


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 70])
def test_accumulation_is_what_the_busiest_rank_needs(world_size, micro_rows):
    """Rank k computes the lanes congruent to k; its j-th lane sits in micro-batch j // micro_rows."""
    for rows in range(1, 65):
        lanes = [len(range(rank, rows, world_size)) for rank in range(world_size)]
        split = RowSplit(rows, world_size, micro_rows)
        assert split.accumulation == max(-(-count // micro_rows) for count in lanes)
        assert split.idle_ranks == lanes.count(0)
        empty = split.accumulation * micro_rows * world_size - rows
        assert split.wasted_frac == pytest.approx(empty / split.computed_rows)


def test_ranks_that_share_rows_are_one_where_rows_are_dealt():
    split = RowSplit(64, 16, 2, sharing=4)
    assert (split.groups, split.accumulation, split.idle_ranks) == (4, 8, 0)
    assert RowSplit(3, 16, 1, sharing=4).idle_ranks == 4
    assert RowSplit(3, 16, 1, sharing=4).wasted_frac == pytest.approx(1 / 4)


def test_hpz_keeps_a_second_copy_of_all_but_small_weights():
    plain, hpz = (states_of(1000, zero_stage=3, precision="bf16", ranks=10, hpz_ranks=size) for size in (1, 5))
    assert hpz.weights - plain.weights == 2 * 1000 // 5


def test_a_better_split_is_offered_only_if_there_is_one():
    assert RowSplit(64, 8, 4).better() is None
    assert RowSplit(24, 4, 4).better().micro_rows == 3
    assert RowSplit(64, 40, 1).better() is None, "nothing smaller than one row"
