"""Where shards are cut: the caps hold, no rest is left over, and nothing is lost."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trichord.building.balance import cut, shuffled


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=300), st.integers(1, 50), st.integers(1, 20_000), st.booleans()
)
def test_caps_hold_and_every_row_is_in_one_shard(sizes, max_samples, max_bytes, even):
    bounds = cut(np.array(sizes), max_samples, max_bytes, even)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    for start, stop in itertools.pairwise(bounds):
        assert 0 < stop - start <= max_samples
        assert stop - start == 1 or sum(sizes[start:stop]) <= max_bytes


def test_by_samples_all_shards_are_of_one_size():
    assert np.diff(cut(np.full(10_001, 100), 5000, 10**9)).tolist() == [3333, 3334, 3334]
    assert np.diff(cut(np.full(10_001, 100), 5000, 10**9, even=False)).tolist() == [5000, 5000, 1]


def test_by_bytes_all_shards_are_within_a_tenth():
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(11, 1, 50_000).astype(np.int64)
    bounds = cut(sizes, 10**6, 2**28)
    held = np.add.reduceat(sizes, bounds[:-1])
    assert len(held) > 10
    assert held.max() <= 2**28
    assert held.min() > 0.9 * held.max()
    full = cut(sizes, 10**6, 2**28, even=False)
    assert len(bounds) <= len(full) + 2


def test_the_shuffle_is_a_fixed_permutation():
    order = shuffled(1000, 5).tolist()
    assert sorted(order) == list(range(1000))
    assert order[:4] == shuffled(1000, 5).tolist()[:4] != shuffled(1000, 6).tolist()[:4]
    assert shuffled(6, 1).tolist() == shuffled(6, 1).tolist()
