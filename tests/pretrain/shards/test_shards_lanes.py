"""The order of the data: each sample once per epoch, the same whatever computes it, resumable, spread over lanes."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.shards.lanes import LanePlanner, LaneSource, LaneState, SampleRef, keyed_permutation


def _planner(seed, sizes, weights, epochs, lanes, window, **options):
    sources = [
        LaneSource(*each) for each in zip(sizes, weights, [()] * len(sizes), [()] * len(sizes), epochs, strict=True)
    ]
    return LanePlanner(seed, sources, num_lanes=lanes, window_samples=window, **options)


def _run(planner, state, max_windows=10_000):
    """All windows of a lane from a state on, until it is used up."""
    windows = []
    while len(windows) < max_windows:
        refs, after = planner.next_window(state, 0)
        if not refs:
            assert after == state
            assert planner.exhausted(state)
            return windows
        windows.append(refs)
        state = after
    return windows


_SIZES = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None)
@given(sizes=_SIZES, lanes=st.integers(1, 9), window=st.integers(1, 7), seed=st.integers(0, 3), data=st.data())
def test_every_sample_once_per_epoch_over_all_lanes(sizes, lanes, window, seed, data):
    epochs = data.draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)), label="epochs")
    weights = data.draw(st.lists(st.sampled_from([0.1, 1.0, 2.5]), min_size=len(sizes), max_size=len(sizes)))
    planner = _planner(seed, sizes, weights, epochs, lanes, window)
    seen = Counter(ref for lane in range(lanes) for refs in _run(planner, planner.first_state(lane)) for ref in refs)
    expected = {
        SampleRef(source, epoch, sample)
        for source, shard_sizes in enumerate(sizes)
        for epoch in range(epochs[source])
        for sample in range(sum(shard_sizes))
    }
    assert set(seen) == expected
    assert set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None)
@given(sizes=_SIZES, lanes=st.integers(1, 6), window=st.integers(1, 9), stop=st.integers(0, 6))
def test_going_on_from_json_in_a_new_planner_changes_nothing(sizes, lanes, window, stop):
    def planner():
        return _planner(7, sizes, [1.0] * len(sizes), [3] * len(sizes), lanes, window)

    whole = _run(planner(), planner().first_state(lanes - 1))
    state, one, before = planner().first_state(lanes - 1), planner(), []
    for _ in range(stop):
        refs, state = one.next_window(state, 0)
        before += [refs] if refs else []
    loaded = LaneState.from_json(json.loads(json.dumps(state.to_json())))
    assert loaded == state
    assert before + _run(planner(), loaded) == whole


def test_lanes_planned_in_turn_or_one_by_one_are_the_same():
    def planner():
        return _planner(3, [[50, 31, 8], [9]], [3.0, 1.0], [2, None], 5, 16)

    alone = {lane: _run(planner(), planner().first_state(lane), 6) for lane in range(5)}
    shared = planner()
    states, together = {lane: shared.first_state(lane) for lane in range(5)}, {lane: [] for lane in range(5)}
    for _ in range(6):
        for lane in reversed(range(5)):
            refs, states[lane] = shared.next_window(states[lane], 0)
            together[lane].append(refs)
    assert together == alone


def test_the_window_size_permutes_but_does_not_choose():
    def first(window, count):
        planner = _planner(1, [[40] * 9, [100]], [2.0, 1.0], [None, None], 4, window)
        return sorted(ref for refs in _run(planner, planner.first_state(2), count) for ref in refs)

    assert first(8, 15) == first(24, 5) == first(120, 1)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.03, 0.97], [5.0, 3.0, 1.5]])
def test_every_prefix_of_a_lane_holds_the_weights_to_within_one_draw(weights):
    planner = _planner(0, [[1000]] * len(weights), weights, [None] * len(weights), 7, 1)
    for lane in range(7):
        counts = Counter()
        for n, (ref,) in enumerate(_run(planner, planner.first_state(lane), 300), start=1):
            counts[ref.source] += 1
            for source, weight in enumerate(weights):
                assert abs(counts[source] - n * weight / sum(weights)) < 1


def test_a_rare_source_does_not_come_at_once_on_all_lanes():
    lanes, period = 64, 64
    planner = _planner(5, [[10**6], [10**6]], [1.0, period - 1.0], [None, None], lanes, 1)
    rare = Counter()
    for lane in range(lanes):
        for draw, (ref,) in enumerate(_run(planner, planner.first_state(lane), 3 * period)):
            rare[draw] += ref.source == 0
    # on average one lane draws it at each draw number; without phases all 64 would at one, and none at the others
    assert sum(rare.values()) == 3 * lanes
    assert max(rare.values()) <= 3


def test_a_source_leaves_after_its_epochs_and_the_others_share():
    planner = _planner(2, [[20], [10_000], [10_000]], [2.0, 1.0, 1.0], [2, None, None], 2, 1)
    order = [refs[0] for refs in _run(planner, planner.first_state(0), 300)]
    first = [place for place, ref in enumerate(order) if ref.source == 0]
    assert len(first) == 20  # half of the samples, twice
    assert {ref.epoch for ref in order if ref.source == 0} == {0, 1}
    rest = Counter(ref.source for ref in order[first[-1] + 1 :])
    assert set(rest) == {1, 2}
    assert abs(rest[1] - rest[2]) <= 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_after_each_leaving_the_shares_of_the_rest_hold_to_within_one_draw(data):
    shares = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5), label="shares")
    sizes = data.draw(st.lists(st.integers(1, 25), min_size=len(shares), max_size=len(shares)), label="sizes")
    planner = _planner(4, [[size] for size in sizes], shares, [1] * len(shares), 1, 1)
    left, since = dict(enumerate(sizes)), Counter()
    for (ref,) in _run(planner, planner.first_state(0)):
        since[ref.source] += 1
        for source in left:
            assert abs(since[source] - Fraction(since.total() * shares[source], sum(shares[s] for s in left))) < 1
        left[ref.source] -= 1
        if not left[ref.source]:
            del left[ref.source]
            since.clear()
    assert not left


def test_new_weights_hold_from_the_window_after_the_open_one():
    sizes, epochs = [[300], [300]], [1, 1]
    old = _planner(4, sizes, [1.0, 3.0], epochs, 2, 20)
    new = _planner(4, sizes, [7.0, 1.0], epochs, 2, 20)
    for lane in range(2):
        first, state = old.next_window(old.first_state(lane), 0)
        open_window, _ = old.next_window(state, 0)
        state = old.opened(state, 0)
        again, after = new.next_window(LaneState.from_json(json.loads(json.dumps(state.to_json()))), 0)
        assert again == open_window  # some of its rows are trained on already
        counts = [Counter(ref.source for ref in refs) for refs in (first, open_window, new.next_window(after, 0)[0])]
        assert [count[0] for count in counts[:2]] == [5, 5]
        assert abs(counts[2][0] - 17.5) < 1
        rest = [ref for refs in _run(new, after) for ref in refs]
        assert len({*first, *open_window, *rest}) == len(first) + len(open_window) + len(rest) == 300


def test_fewer_samples_than_lanes_starve_no_lane():
    planner = _planner(0, [[3]], [1.0], [8], 8, 4)
    for lane in range(8):
        assert sum(len(refs) for refs in _run(planner, planner.first_state(lane))) == 3


def test_epochs_differ_windows_are_permuted_and_a_window_stays_near_its_shards():
    planner = _planner(0, [[100] * 50], [1.0], [2], 1, 100)
    windows = _run(planner, planner.first_state(0))
    assert len(windows) == 100
    samples = [[ref.sample for ref in refs] for refs in windows]
    for window in samples:
        assert len({sample // 100 for sample in window}) == 1
        assert window != sorted(window)
    shard_orders = [[window[0] // 100 for window in half] for half in (samples[:50], samples[50:])]
    assert sorted(shard_orders[0]) == sorted(shard_orders[1]) == list(range(50))
    assert shard_orders[0] != shard_orders[1]


def test_the_seed_changes_the_order():
    def first(seed):
        planner = _planner(seed, [[10] * 10], [1.0], [1], 2, 20)
        return planner.next_window(planner.first_state(0), 0)[0]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_an_epoch_costs_shards_not_samples():
    planner = _planner(0, [[10**12] * 100], [1.0], [None], 8, 64)
    refs, state = planner.next_window(planner.first_state(7), 0)
    assert len({ref.sample for ref in refs}) == 64
    assert len(json.dumps(state.to_json())) < 200


def test_the_order_never_changes_between_versions():
    """Literal: a run that is resumed by a later version must go on with the same data."""
    planner = _planner(0, [[3, 2, 4], [5]], [2.0, 1.0], [None, None], 2, 6)
    refs, state = planner.next_window(planner.first_state(1), 0)
    assert [tuple(ref) for ref in refs] == [(0, 0, 0), (0, 0, 2), (1, 0, 2), (1, 0, 3), (0, 0, 3), (0, 0, 1)]
    assert state == LaneState(1, 1, False, shares=(2, 1), counts=(4, 2), cursors=((0, 4), (0, 2)))
    assert keyed_permutation(6, 1) == [1, 2, 5, 0, 4, 3]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="got 0, 1 and 1"):
        LanePlanner(0, [], num_lanes=1, window_samples=1)
    with pytest.raises(ValueError, match="lane must be 0 to 3, got 4"):
        _planner(0, [[1]], [1.0], [1], 4, 1).first_state(4)
