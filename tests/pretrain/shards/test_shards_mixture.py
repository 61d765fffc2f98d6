"""Every prefix of a lane holds the target shares to within one draw, whatever the weights and phases."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
