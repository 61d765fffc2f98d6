"""Model states and row splits: pure arithmetic, against the paper's own numbers and a brute-force count."""

import pytest

from trichord.planning.memory import checkpoint_bytes, model_states
from trichord.planning.rows import RowSplit


def without_buffers(states):
    return states.device - states.buffers


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage, gigabytes):
    """Psi = 7.5 B, N = 64, K = 12: 120 GB on each GPU without ZeRO, then these."""
    states = model_states(7_500_000_000, 0, zero_stage=stage, precision="bf16", world_size=64)
    assert without_buffers(states) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_without_zero_every_rank_has_all():
    assert model_states(1000, 0, zero_stage=0, precision="autocast_bf16", world_size=8).device == 16_000
    assert without_buffers(model_states(1000, 0, zero_stage=1, precision="bf16", world_size=1)) == 16_000


def test_fp32_with_zero_has_a_master_of_its_own():
    states = model_states(1000, 0, zero_stage=2, precision="fp32", world_size=10)
    assert (states.weights, states.gradients, states.master, states.moments) == (4000, 400, 400, 800)


def test_frozen_parameters_are_weights_only():
    for stage, weights in ((1, 2 * 1500), (2, 2 * 1500), (3, 2 * 150)):
        states = model_states(500, 1000, zero_stage=stage, precision="bf16", world_size=10)
        assert states.weights == weights
        assert (states.master, states.moments) == (200, 400)


def test_offload_moves_states_to_the_host():
    on_device = model_states(1000, 0, zero_stage=2, precision="bf16", world_size=10)
    offloaded = model_states(1000, 0, zero_stage=2, precision="bf16", world_size=10, offload="optimizer")
    assert (offloaded.master, offloaded.moments, offloaded.gradients) == (0, 0, 0)
    assert offloaded.host == on_device.master + on_device.moments + 400
    everything = model_states(1000, 0, zero_stage=3, precision="bf16", world_size=10, offload="all")
    assert (everything.weights, everything.host) == (0, 1200 + 400 + 200)


def test_partitions_are_rounded_up():
    assert model_states(1001, 0, zero_stage=3, precision="bf16", world_size=10).weights == 2 * 101


def test_buckets_are_no_larger_than_the_model():
    small = model_states(1000, 0, zero_stage=3, precision="bf16", world_size=1)
    assert small.buffers == 2 * 2 * 1000 + 2 * 1000
    large = model_states(10**10, 0, zero_stage=3, precision="bf16", world_size=64)
    assert large.buffers == 2 * 2 * 500_000_000 + 2 * 10**9


def test_a_checkpoint_holds_everything_once():
    assert checkpoint_bytes(trainable=100, frozen=10) == 12 * 100 + 4 * 10


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


def test_a_better_split_is_offered_only_if_there_is_one():
    assert RowSplit(64, 8, 4).better() is None
    assert RowSplit(24, 4, 4).better().micro_rows == 3
    assert RowSplit(64, 40, 1).better() is None, "nothing smaller than one row"
