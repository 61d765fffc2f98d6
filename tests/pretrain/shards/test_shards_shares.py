"""From weights to shares: exact, nested, by step, by tokens."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.shards.shares import FINEST_SHARE, WeightTree, exact, whole_shares


def _tree(weights, groups=None, group_weights=None, schedules=None, tokens=None):
    n = len(weights)
    paths = [tuple(group.split("/")) if group else () for group in (groups or [""] * n)]
    return WeightTree(paths, weights, schedules or [()] * n, group_weights or {}, tokens or [1.0] * n)


def _parts(shares):
    return [Fraction(share, sum(shares)) for share in shares]


def test_float_weights_count_as_the_decimals_they_print_as():
    assert _tree([0.1, 0.2, 0.7]).shares(0, range(3)) == (1, 2, 7)
    assert _tree([1.0, 1e-3]).shares(0, range(2)) == (1000, 1)
    assert _tree([5.0]).shares(0, [0]) == (1,)


def test_a_group_has_its_weight_whatever_is_in_it():
    tree = _tree(
        [1.0, 3.0, 2.0, 6.0],
        ["speech/english", "speech/english", "speech", ""],
        {"speech": 2.0, "speech/english": 8.0},
    )
    # beside each other: speech 2 and the last source 6; in speech: english 8 and source 2; in english: 1 and 3
    assert _parts(tree.shares(0, range(4))) == [Fraction(1, 20), Fraction(3, 20), Fraction(1, 20), Fraction(3, 4)]


def test_what_runs_out_inside_a_group_is_made_up_for_inside_it():
    groups = ["a/x", "a/x", "a/y", "b"]
    tree = _tree([1.0, 1.0, 5.0, 9.0], groups, {"a": 1.0, "b": 1.0, "a/x": 3.0, "a/y": 1.0})
    assert _parts(tree.shares(0, range(4))) == [Fraction(3, 16), Fraction(3, 16), Fraction(1, 8), Fraction(1, 2)]
    assert _parts(tree.shares(0, [1, 2, 3])) == [0, Fraction(3, 8), Fraction(1, 8), Fraction(1, 2)]
    assert _parts(tree.shares(0, [2, 3])) == [0, 0, Fraction(1, 2), Fraction(1, 2)]
    assert _parts(tree.shares(0, [3])) == [0, 0, 0, 1]


_NAMES = st.sampled_from(["", "a", "b", "a/x", "a/y", "a/x/deep", "b/x"])
_WEIGHT = st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0, 7.0])


@st.composite
def _trees(draw):
    groups = draw(st.lists(_NAMES, min_size=1, max_size=7))
    named = {"/".join(g.split("/")[:d]) for g in groups if g for d in range(1, g.count("/") + 2)}
    group_weights = {name: draw(_WEIGHT) for name in sorted(named)}
    return groups, group_weights, _tree([draw(_WEIGHT) for _ in groups], groups, group_weights)


@settings(max_examples=150, deadline=None)
@given(tree=_trees(), data=st.data())
def test_shares_after_each_leaving_are_those_of_the_sources_that_stay(tree, data):
    """A window in which sources run out goes on with what the next window will have, so no count is lost."""
    groups, _, tree = tree
    active = list(range(len(groups)))
    shares = tree.shares(0, active)
    for left in data.draw(st.permutations(active)):
        active.remove(left)
        shares = tree.without(shares, left, active)
        assert shares == tree.shares(0, active)
    assert not any(shares)


@settings(max_examples=100, deadline=None)
@given(tree=_trees(), data=st.data())
def test_a_group_keeps_its_share_while_one_of_its_sources_lasts(tree, data):
    groups, group_weights, tree = tree
    active = data.draw(st.lists(st.sampled_from(range(len(groups))), min_size=1, unique=True).map(sorted))
    parts = _parts(tree.shares(0, active))
    outermost = {name.split("/")[0] for name in groups if name}
    alive = {name for name in outermost if any(groups[s].split("/")[0] == name for s in active)}
    share = {name: sum(parts[s] for s in active if groups[s].split("/")[0] == name) for name in alive}
    for name in alive:
        for other in alive:
            assert share[name] * exact(group_weights[other]) == share[other] * exact(group_weights[name])
    assert sum(parts) == 1


def test_weights_are_those_of_the_step():
    tree = _tree([1.0, 1.0], schedules=[((10, 3.0), (20, 9.0)), ((20, 3.0),)])
    by_step = {step: tree.shares(step, [0, 1]) for step in (0, 9, 10, 19, 20, 10**9)}
    assert by_step == {0: (1, 1), 9: (1, 1), 10: (3, 1), 19: (3, 1), 20: (3, 1), 10**9: (3, 1)}


def test_weights_by_tokens_share_out_tokens():
    tree = _tree([1.0, 1.0, 2.0], ["g", "g", ""], {"g": 2.0}, tokens=[10.0, 250.0, 40.0])
    draws = tree.shares(0, range(3))
    assert _parts([draws[0] * 10, draws[1] * 250, draws[2] * 40]) == [Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)]
    # the last bits of a mean may differ between machines, six digits do not
    assert _tree([1.0, 1.0], tokens=[100 / 3, 7.0]).shares(0, [0, 1]) == _tree(
        [1.0, 1.0], tokens=[33.3333, 7.0]
    ).shares(0, [0, 1])


def test_shares_too_fine_for_exact_integers_are_rounded_alike_everywhere():
    fractions = [Fraction(1, prime) for prime in (1_000_003, 1_000_033, 1_000_037, 7)]
    shares = whole_shares(fractions)
    assert sum(shares) == FINEST_SHARE
    for share, fraction in zip(shares, fractions):
        assert abs(Fraction(share, FINEST_SHARE) - fraction / sum(fractions)) < Fraction(2, FINEST_SHARE)
    assert shares[3] == 1099488539078
    assert whole_shares([Fraction(1, 10**30), Fraction(1)]) == (1, FINEST_SHARE - 1)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_must_be_positive_and_finite(weight):
    with pytest.raises(ValueError, match="positive and finite, got"):
        _tree([1.0, weight])
    with pytest.raises(ValueError, match="positive and finite, got"):
        _tree([1.0], ["g"], {"g": weight})


def test_groups_need_weights_and_schedules_ascend():
    with pytest.raises(ValueError, match=r"groups \['a/b'\] have no weight, only \['a'\] have"):
        _tree([1.0], ["a/b"], {"a": 1.0})
    with pytest.raises(ValueError, match=r"must ascend, got \[\[5, 5\]\]"):
        _tree([1.0], schedules=[((5, 1.0), (5, 2.0))])
