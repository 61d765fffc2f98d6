"""Groups, schedules, states and jumps of the lane planner: what resumes and long runs rest on."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.core.errors import CheckpointError
from trichord.shards import epochs, mixture
from trichord.shards.lanes import LanePlanner, LaneSource, LaneState, SampleRef

_GROUPS = st.sampled_from([(), ("a",), ("b",), ("a", "x"), ("a", "y")])
_WEIGHT = st.sampled_from([0.1, 0.5, 1.0, 2.5, 8.0])
_FEW_EPOCHS = st.integers(1, 3)


def _saved(state: LaneState) -> LaneState:
    return LaneState.from_json(json.loads(json.dumps(state.to_json())))


@st.composite
def _mixes(draw, max_samples=40, epochs: st.SearchStrategy[int | None] = _FEW_EPOCHS):
    """Arguments of a planner of up to five sources, some in groups, some with schedules, some with empty shards."""
    sources = [
        LaneSource(
            shard_sizes=draw(st.lists(st.integers(0, max_samples), min_size=1, max_size=4)),
            weight=draw(_WEIGHT),
            schedule=tuple((step, draw(_WEIGHT)) for step in draw(st.sets(st.integers(0, 12), max_size=2).map(sorted))),
            group=draw(_GROUPS),
            epochs=draw(epochs),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]
    group_weights = {name: draw(_WEIGHT) for name in ("a", "b", "a/x", "a/y")}
    lanes, window, seed = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    return lambda: LanePlanner(
        seed, sources, num_lanes=lanes, window_samples=window, group_weights=group_weights
    ), sources


def _run(planner: LanePlanner, state: LaneState, first_step: int = 0) -> list[list[SampleRef]]:
    """All windows from a state on; every window takes two steps."""
    windows = []
    while True:
        refs, after = planner.next_window(state, first_step + 2 * len(windows))
        if not refs:
            assert planner.exhausted(state)
            return windows
        windows.append(refs)
        state = after


@settings(max_examples=100, deadline=None)
@given(_mixes())
def test_each_sample_once_per_epoch_whatever_the_mix(mix):
    make, sources = mix
    planner = make()
    seen = Counter(
        ref for lane in range(planner.num_lanes) for w in _run(planner, planner.first_state(lane)) for ref in w
    )
    assert seen == Counter(
        SampleRef(number, epoch, sample)
        for number, source in enumerate(sources)
        for epoch in range(source.epochs or 0)
        for sample in range(sum(source.shard_sizes))
    )


@settings(max_examples=80, deadline=None)
@given(mix=_mixes(), data=st.data())
def test_any_planner_goes_on_from_any_state_in_any_order(mix, data):
    """The order is a function of state and step: what was asked before, by whom and how often is not in it."""
    make, _ = mix
    reference = make()
    states, windows = {}, {}
    for lane in range(reference.num_lanes):
        state = reference.first_state(lane)
        for number in range(8):
            states[lane, number] = state
            windows[lane, number], state = reference.next_window(state, 2 * number)
            states[lane, number, "after"] = state
    asked = data.draw(st.lists(st.sampled_from(sorted(windows)), min_size=1, max_size=12), label="asked")
    other = make()
    for lane, number in asked:
        state, step = _saved(states[lane, number]), 2 * number
        if data.draw(st.booleans(), label="resumed inside the window"):
            state, step = _saved(other.opened(state, step)), step + 1000
        assert other.next_window(state, step) == (windows[lane, number], states[lane, number, "after"])


@settings(max_examples=60, deadline=None)
@given(mix=_mixes(max_samples=4000, epochs=st.none()), data=st.data())
def test_prefixes_hold_the_nested_shares_between_changes(mix, data):
    """Within one draw for each source; for a group, within as many as it has sources, or as are outside it."""
    make, sources = mix
    planner = make()
    filled = [number for number, source in enumerate(sources) if sum(source.shard_sizes)]
    if not filled:
        return
    lane = data.draw(st.integers(0, planner.num_lanes - 1))
    state, counts, shares = planner.first_state(lane), Counter(), ()
    for number in range(60):
        opened = planner.opened(state, number)
        if opened.shares != shares:
            shares, counts = opened.shares, Counter()
        refs, state = planner.next_window(opened, number)
        counts.update(ref.source for ref in refs)
        n, total = counts.total(), sum(shares)
        for source in filled:
            assert abs(counts[source] - Fraction(n * shares[source], total)) < 1
        for name in {source.group[:1] for source in sources if source.group}:
            inside = [s for s in filled if sources[s].group[:1] == name]
            error = sum(counts[s] for s in inside) - Fraction(n * sum(shares[s] for s in inside), total)
            assert abs(error) <= min(len(inside), len(filled) - len(inside))


def _draws(planner: LanePlanner, lane: int, count: int) -> list[int]:
    """Sources of a lane's draws, one window each."""
    state, order = planner.first_state(lane), []
    for step in range(count):
        refs, state = planner.next_window(state, step)
        order += [ref.source for ref in refs]
    return order


def test_a_group_makes_up_for_a_source_of_its_own_that_ran_out():
    sources = [
        LaneSource([30], weight=3.0, group=("speech",), epochs=1),
        LaneSource([10_000], weight=1.0, group=("speech",)),
        LaneSource([10_000], weight=5.0),
    ]
    planner = LanePlanner(1, sources, num_lanes=1, window_samples=1, group_weights={"speech": 5.0})
    order = _draws(planner, 0, 400)
    last = max(place for place, source in enumerate(order) if source == 0)
    assert abs(Counter(order[: last + 1])[2] - (last + 1) / 2) < 2
    assert abs(Counter(order[last + 1 :])[2] - (399 - last) / 2) < 1  # not 5 of 6


def test_scheduled_weights_hold_from_the_window_that_opens_at_their_step():
    sources = [LaneSource([1000], schedule=((7, 3.0),)), LaneSource([1000])]
    planner = LanePlanner(0, sources, num_lanes=2, window_samples=40)
    state = planner.first_state(1)
    seen = []
    for step in (0, 6, 7, 8):
        refs, state = planner.next_window(state, step)
        seen.append(Counter(ref.source for ref in refs)[0])
    assert seen == [20, 20, 30, 30]


def test_a_window_that_is_open_over_a_change_is_replayed_as_it_began():
    """By schedule, and by other weights that a run is resumed with; also where a source runs out in it."""

    def make(weight, schedule=(), group=1.0):
        sources = [
            LaneSource([300], weight, schedule, ("g",), 1),
            LaneSource([30], 1.0, (), ("g",), 1),
            LaneSource([300], 1.0, (), (), 1),
        ]
        return LanePlanner(3, sources, num_lanes=2, window_samples=80, group_weights={"g": group})

    planner = make(1.0, ((5, 9.0),))
    for lane in range(2):
        opened = planner.opened(planner.first_state(lane), 4)
        refs, after = planner.next_window(opened, 4)
        seen = Counter(ref.source for ref in refs)
        assert seen[1] == 15  # it ran out at about the 60th draw, and source 0 has had all of the group's half since
        assert abs(seen[0] - 25) <= 1
        for later in (planner, make(7.0), make(1.0, ((2, 4.0),), group=8.0)):
            assert later.next_window(_saved(opened), 6) == (refs, after)
        following = [make(weight).next_window(_saved(after), 6)[0] for weight in (1.0, 7.0)]
        assert following[0] == following[1]  # one source is left in the group: its weight decides nothing
        counts = [Counter(ref.source for ref in make(1.0, group=g).next_window(after, 6)[0]) for g in (1.0, 3.0)]
        assert [count[0] for count in counts] == [40, 60]


def test_states_that_are_damaged_or_of_another_run_are_refused():
    sources = [LaneSource([40, 20], 2.0), LaneSource([30])]
    planner = LanePlanner(0, sources, num_lanes=3, window_samples=8)
    state = planner.next_window(planner.first_state(2), 0)[1]
    good = planner.opened(state, 1).to_json()
    for damage in (
        {"lane": "2"}, {"lane": -1}, {"window": 1.5}, {"window": None}, {"open": 1}, {"shares": [2]}, {"shares": None},
        {"counts": [1, True]}, {"counts": [1, -2]}, {"counts": {}}, {"cursors": [[0, 1]]}, {"cursors": [[0], [0]]},
        {"cursors": [3, 4]}, {"cursors": [["0", 1], [0, 1]]},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            LaneState.from_json({**good, **damage})
    for field in good:
        with pytest.raises(KeyError):
            LaneState.from_json({name: value for name, value in good.items() if name != field})
    for damage, words in (
        ({"lane": 3}, "of lane 3 with 2 sources, the run has lanes 0 to 2 and 2 sources"),
        ({"shares": [1], "counts": [0], "cursors": [[0, 0]]}, "with 1 sources"),
        ({"cursors": [[0, 99], [0, 2]]}, "lane 2 stands at sample 99 of 20 in epoch 0 of source number 0"),
        ({"shares": [2, 0]}, "with share 0"),
        ({"counts": [50, 1]}, "no run with shares"),
    ):
        with pytest.raises(CheckpointError, match=words):
            planner.next_window(LaneState.from_json({**good, **damage}), 1)


@pytest.mark.parametrize("weights", [[1.0, 63.0], [1.0, 2.0, 61.0], [0.01, 0.04, 0.15, 0.8], [0.0503, 0.1207, 0.829]])
def test_a_rare_source_is_spread_over_lanes_and_draws(weights):
    """Proven: b draws of a lane hold less than b w + 2 of a source with share w, so L lanes less than L (b w + 2).

    Measured, for the rarest source: any 32 draws of all lanes hold at most 1.5 times their share, any 256 (a window)
    1.06 times; with one rare source among two, a single draw number at most 2 lanes over it.
    """
    lanes, count = 64, 512
    planner = LanePlanner(5, [LaneSource([10**7], w) for w in weights], num_lanes=lanes, window_samples=64)
    at_draw = [0] * count
    for lane in range(lanes):
        order = mixture.Mixture(
            planner._tree.shares(0, range(len(weights))), [phases[lane] for phases in planner._phases], 2 * lanes
        )
        for draw in range(count):
            at_draw[draw] += order.draw() == 0
    share = lanes * weights[0] / sum(weights)
    for draws, factor in ((32, 1.5), (256, 1.06)):
        most = max(sum(at_draw[start : start + draws]) for start in range(count - draws))
        assert most <= factor * draws * share
    if len(weights) == 2:
        assert max(at_draw) <= share + 2


def test_starting_at_sample_ten_million_costs_what_a_fresh_start_costs(monkeypatch):
    """Counted: looks into an epoch's order, draws, and draws looked ahead at, of the first window of each lane."""
    lanes, window, done = 16, 256, 10_000_000
    sizes = [[10_000 + shard % 7 for shard in range(1000)] for _ in range(3)]
    sources = [LaneSource(each, weight) for each, weight in zip(sizes, (3.0, 2.0, 1.0))]
    calls = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counted(self, *args):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((epochs._EpochOrder, "run"), (mixture.Mixture, "draw"), (mixture.Mixture, "_extend_slack")):
        count(owner, name)

    def first_windows(states):
        planner = LanePlanner(0, sources, num_lanes=lanes, window_samples=window)
        calls.clear()
        refs = [planner.next_window(state(planner, lane), 0)[0] for lane, state in enumerate(states)]
        return refs, dict(calls)

    per_lane = done // lanes // 6 * 6  # a multiple of the mixture's period, so that the counts are known

    def far(planner, lane):
        counts = (per_lane // 2, per_lane // 3, per_lane // 6)
        cursors = []
        for number, position in enumerate(counts):
            epoch, source = 0, planner._epochs[number]
            while position >= (length := source.slice(lane, epoch)[1] - source.slice(lane, epoch)[0]):
                epoch, position = epoch + 1, position - length
            cursors.append((epoch, position))
        return LaneState(lane, per_lane // window, False, (3, 2, 1), counts, tuple(cursors))

    fresh, cost = first_windows([lambda planner, lane: planner.first_state(lane)] * lanes)
    later, late_cost = first_windows([far] * lanes)
    assert {len(refs) for refs in (*fresh, *later)} == {window}
    assert not {ref for refs in fresh for ref in refs} & {ref for refs in later for ref in refs}
    for counted in (cost, late_cost):
        assert counted["draw"] == lanes * window
        assert counted["run"] <= lanes * 2 * len(sources)  # once per source and window, and where a shard ends
        assert counted["_extend_slack"] <= lanes * (window + 32)


def test_few_samples_and_many_lanes_find_their_next_epoch_at_once(monkeypatch):
    """One sample, 1,000 lanes: a lane's turn comes every 1,000 epochs, and none of those between is looked at."""
    planner = LanePlanner(0, [LaneSource([1])], num_lanes=1000, window_samples=3)
    looked = []
    slice_of = epochs.SourceEpochs.slice
    monkeypatch.setattr(
        epochs.SourceEpochs, "slice", lambda self, lane, epoch: (looked.append(epoch), slice_of(self, lane, epoch))[1]
    )
    seen = [planner.next_window(planner.first_state(lane), 0)[0] for lane in (0, 7, 999)]
    assert [sorted(ref.epoch for ref in refs) for refs in seen] == [
        [999, 1999, 2999],
        [992, 1992, 2992],
        [0, 1000, 2000],
    ]
    assert len(looked) < 60
