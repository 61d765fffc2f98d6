"""Packing: nothing lost, nothing too long, deterministic, and no row opened without need."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.batches.interleave import StreamArrays, StreamPart, segment_length
from trichord.batches.packing import group_rows, pack_rows, split_parts


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


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    row_tokens=st.integers(50, 120),
    samples_per_row=st.integers(1, 8),
)
def test_rows_by_count_hold_neighbours_in_length(lengths, row_tokens, samples_per_row):
    rows = group_rows(lengths, row_tokens, samples_per_row)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    bounds = [(min(lengths[i] for i in row), max(lengths[i] for i in row)) for row in rows]
    assert all(upper[0] >= lower[1] for lower, upper in itertools.pairwise(bounds))
    for row, following in itertools.pairwise(rows):
        assert sum(lengths[i] for i in row) <= row_tokens
        shortest = min(lengths[i] for i in following)
        assert len(row) == samples_per_row or sum(lengths[i] for i in row) + shortest > row_tokens


def parts_strategy():
    text = st.lists(st.integers(10, 99), min_size=0, max_size=40).map(lambda ids: StreamPart.text(ids, learned=True))
    prompt = st.lists(st.integers(100, 199), min_size=1, max_size=9).map(StreamPart.text)
    return st.lists(st.one_of(text, prompt, st.builds(StreamPart.audio, st.integers(0, 7))), min_size=1, max_size=8)


@settings(deadline=None)
@given(parts=parts_strategy(), row_tokens=st.integers(8, 30))
def test_split_learns_every_token_once(parts, row_tokens):
    whole = [StreamPart.text([1]), *parts]
    pieces = split_parts(whole, row_tokens, bos_id=1)
    assert pieces is not None
    assert all(sum(part.length for part in piece) <= row_tokens for piece in pieces)
    learned = [token for part in whole if part.learned for token in part.ids]
    assert [t for piece in pieces for part in piece if part.learned for t in part.ids] == learned
    items = [part.length for part in whole if part.ids is None]
    assert [part.length for piece in pieces for part in piece if part.ids is None] == items
    for piece in pieces[1:]:
        assert not piece[0].learned
        assert piece[0].length == 1, "a piece opens with one token of context"
    labelled = 0
    for piece in pieces:
        stream = StreamArrays(segment_length(piece), pad_id=0, image_id=4, audio_id=5)
        stream.write(0, piece, 0)
        labelled += int((stream.labels >= 0).sum())
    assert labelled == len(learned), "a label is lost where two pieces meet"


def test_split_opens_with_the_token_before_it():
    pieces = split_parts([StreamPart.text([1]), StreamPart.text(range(10, 25), learned=True)], 8, bos_id=1)
    assert [[part.ids for part in piece] for piece in pieces] == [
        [(1,), (10, 11, 12, 13, 14, 15, 16)],
        [(16,), (17, 18, 19, 20, 21, 22, 23)],
        [(23,), (24,)],
    ]


def test_item_longer_than_a_row_cannot_be_split():
    assert split_parts([StreamPart.text([1]), StreamPart.audio(8)], 8, bos_id=1) is None
