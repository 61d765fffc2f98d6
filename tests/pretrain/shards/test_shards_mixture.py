"""Every prefix of a lane holds the target shares to within one draw, whatever the weights and phases."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.shards import mixture as module
from trichord.shards.mixture import Mixture


def _draws(shares, phases, unit, n):
    mixture = Mixture(shares, phases, unit)
    return [mixture.draw() for _ in range(n)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_prefixes_stay_within_one_draw(data):
    shares = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6), label="shares")
    phases = data.draw(st.lists(st.integers(0, 999), min_size=len(shares), max_size=len(shares)), label="phases")
    counts, total = [0] * len(shares), sum(shares)
    for n, source in enumerate(_draws(shares, phases, 1000, 150), start=1):
        counts[source] += 1
        for count, share in zip(counts, shares):
            assert abs(count - Fraction(n * share, total)) < 1


def test_a_period_holds_exactly_the_shares():
    assert sorted(_draws((3, 2, 5), (0, 400, 999), 1000, 10)) == [0] * 3 + [1] * 2 + [2] * 5


@pytest.mark.parametrize("phase", [1, 250, 500, 750, 999])
def test_the_phase_places_a_rare_source(phase):
    order = _draws((1, 99), (phase, 0), 1000, 100)
    assert abs(order.index(0) - phase / 10) <= 1


def test_a_very_rare_source_is_cheap():
    # one draw in a million: each draw must not look a million draws ahead
    order = _draws((1, 999_999), (1, 0), 2000, 5000)
    assert order.count(0) == 1


def _reference(shares, phases, unit, n):
    """The rule as its docstring states it, every deadline looked at for every candidate."""
    total, counts, order = sum(shares), [0] * len(shares), []
    for draw in range(1, n + 1):
        may_come = [i for i, share in enumerate(shares) if counts[i] * total < draw * share]
        for i in sorted(may_come, key=lambda i: (Fraction(counts[i] * unit + phases[i], shares[i]), i)):
            after = [count + (i == other) for other, count in enumerate(counts)]
            deadline = -(-after[i] * total // shares[i])
            if all(sum(max(d * s // total, c) for s, c in zip(shares, after)) <= d for d in range(draw, deadline)):
                break
        else:
            raise AssertionError("earliest deadline first never fails")
        counts[i] += 1
        order.append(i)
    return order


_SHARES = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 200)), min_size=2, max_size=6)


@settings(max_examples=100, deadline=None)
@given(shares=_SHARES, data=st.data())
def test_looking_ahead_once_per_draw_is_as_good_as_looking_for_each_candidate(shares, data):
    phases = data.draw(st.lists(st.integers(0, 99), min_size=len(shares), max_size=len(shares)), label="phases")
    assert _draws(shares, phases, 100, 60) == _reference(shares, phases, 100, 60)


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 2**40)), min_size=2, max_size=12),
    look_ahead=st.sampled_from([40, module.MAX_LOOK_AHEAD]),
    data=st.data(),
)
def test_going_on_from_counts_changes_nothing_and_shares_of_any_size_hold(shares, look_ahead, data):
    """Also where looking ahead stops early and a rare source is put off."""
    phases = data.draw(st.lists(st.integers(0, 99), min_size=len(shares), max_size=len(shares)), label="phases")
    stops = data.draw(st.sets(st.integers(0, 199), max_size=8), label="stops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_LOOK_AHEAD", look_ahead)
        whole = _draws(shares, phases, 100, 200)
        mixture, again = Mixture(shares, phases, 100), []
        for n in range(200):
            if n in stops:
                mixture = Mixture(shares, phases, 100, mixture.counts)
            again.append(mixture.draw())
    assert again == whole
    counts, total = [0] * len(shares), sum(shares)
    for n, source in enumerate(whole, start=1):
        counts[source] += 1
        assert all(abs(count * total - n * share) < total for count, share in zip(counts, shares))


def test_counts_that_no_run_leads_to_are_refused():
    with pytest.raises(ValueError, match=r"no run with shares .* leads to counts"):
        Mixture((1, 1), (0, 0), 1, [3, 1])
    # each count is within one draw, but three sources are owed the next draw
    mixture = Mixture([190] * 3 + [86] * 5, [0] * 8, 1, [0] * 3 + [1] * 5)
    with pytest.raises(ValueError, match=r"no run with shares .* leads to counts"):
        mixture.draw()


@pytest.mark.parametrize("shares", [[1] * 200, [7**i % 1009 + 1 for i in range(200)]])
def test_many_sources_cost_a_few_looks_per_draw(shares, monkeypatch):
    """Slack is kept, not made anew: what is looked at in 2,000 draws grows with the draws, not with draws x sources."""
    extended = []
    extend = Mixture._extend_slack
    monkeypatch.setattr(Mixture, "_extend_slack", lambda self: (extended.append(1), extend(self))[1])
    _draws(shares, [(17 * i) % 64 for i in range(200)], 64, 2000)
    assert len(extended) < 2000 + module.MAX_LOOK_AHEAD


def test_rare_sources_that_come_early_leave_room_for_a_crowd_of_deadlines():
    """Fifty sources fall due together at draw 50, later than a first look at whether all is settled."""
    shares, phases = [2000] * 50 + [1, 1, 1], [50] * 50 + [0, 0, 0]
    counts, total = [0] * len(shares), sum(shares)
    for n, source in enumerate(_draws(shares, phases, 100, 300), start=1):
        counts[source] += 1
        assert all(abs(count * total - n * share) < total for count, share in zip(counts, shares))


def test_the_earliest_deadline_is_taken_where_no_source_is_known_to_fit(monkeypatch):
    monkeypatch.setattr(Mixture, "_fits", lambda self, source: False)
    shares, total = [3, 5, 11, 40], 59
    counts = [0] * 4
    for n, source in enumerate(_draws(shares, [90, 0, 50, 20], 100, 400), start=1):
        counts[source] += 1
        assert all(abs(count * total - n * share) < total for count, share in zip(counts, shares))
