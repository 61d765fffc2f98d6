"""Packing: nothing lost, nothing too long, deterministic, and no row opened without need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.batches.packing import pack_rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(1, 9))
def test_every_item_once_and_rows_fit(lengths, max_samples):
    rows = pack_rows(lengths, 64, max_samples)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 and 1 <= len(row) <= max_samples for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert rows == pack_rows(list(lengths), 64, max_samples)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_a_row_is_opened_only_where_no_earlier_one_has_room(lengths):
    rows = pack_rows(lengths, 64, 10**6)
    for number, row in enumerate(rows):
        free = 64 - sum(lengths[i] for i in row)
        assert all(max(lengths[i] for i in later) > free for later in rows[number + 1 :])


def test_best_fit_takes_the_fullest_row_that_still_has_room():
    assert pack_rows([6, 7, 3, 4], 10, 9) == [[1, 2], [0, 3]]


def test_ties_go_to_the_earlier_item_and_row():
    assert pack_rows([5, 5, 5, 5], 10, 9) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("length", [0, 11])
def test_item_that_fits_no_row_is_refused(length):
    with pytest.raises(ValueError, match=f"item 1 has {length} tokens, a row takes 1 to 10"):
        pack_rows([3, length], 10, 9)
