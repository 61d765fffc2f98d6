"""Rows to ranks: every row once, loads even, whatever the group."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.batches.config import BatchesConfig
from trichord.batches.dealing import RowLayout


def config(rows_per_step, micro_rows=1, deal_ranks=1):
    return BatchesConfig(tokenizer="unused", rows_per_step=rows_per_step, micro_rows=micro_rows, deal_ranks=deal_ranks)


@settings(deadline=None)
@given(
    rows=st.one_of(st.integers(1, 1024), st.sampled_from([1026, 1536, 2048, 3000])),
    world_size=st.integers(1, 20),
    micro_rows=st.integers(1, 3),
    deal_ranks=st.integers(1, 6),
)
def test_every_row_has_one_rank_and_every_lane_one_keeper(rows, world_size, micro_rows, deal_ranks):
    batches = config(rows, micro_rows, deal_ranks)
    layouts = [RowLayout(batches, rank, world_size) for rank in range(world_size)]
    undealt = [row for layout in layouts for row in layout.rows[layout.place]]
    assert sorted(undealt) == list(range(rows))
    kept = [lane for layout in layouts for lane in layout.own_lanes]
    assert sorted(kept) == list(range(batches.num_lanes))
    for layout in layouts:
        assert set(layout.own_lanes) <= set(layout.planned_lanes)
        assert len(layout.rows[layout.place]) <= layout.micro_steps * micro_rows


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(2, 6), st.integers(1, 3))
def test_dealing_moves_rows_and_loses_none(data, rows, deal_ranks, micro_rows):
    world_size = deal_ranks * data.draw(st.integers(1, 3))
    batches = config(rows, micro_rows, deal_ranks)
    costs = dict(enumerate(data.draw(st.lists(st.floats(0, 100), min_size=rows, max_size=rows))))
    dealt = []
    for rank in range(0, world_size, deal_ranks):
        group = [RowLayout(batches, rank + place, world_size) for place in range(deal_ranks)]
        own = {row: costs[row] for peers in group[0].rows for row in peers}
        deals = [layout.deal(own) for layout in group]
        assert all(deal == deals[0] for deal in deals), "the ranks of a group must come to the same deal"
        assert all(len(rows) <= group[0].micro_steps * micro_rows for rows in deals[0].rows)
        dealt += [row for rows in deals[0].rows for row in rows]
        for rows_of_rank in deals[0].rows:
            assert [costs[row] for row in rows_of_rank] == sorted((costs[row] for row in rows_of_rank), reverse=True)
    assert sorted(dealt) == list(range(rows))


def test_undealt_rows_stay_in_order():
    layout = RowLayout(config(8, micro_rows=2), 1, 2)
    deal = layout.deal(dict.fromkeys(range(8), 1.0))
    assert deal.rows == ((1, 3, 5, 7),)
    assert layout.micro_steps == 2


def test_dealing_evens_out_the_load():
    costs = {0: 100.0, 1: 1.0, 2: 90.0, 3: 2.0, 4: 80.0, 5: 3.0, 6: 70.0, 7: 4.0}
    deal = RowLayout(config(8, deal_ranks=2), 0, 2).deal(costs)
    assert deal.before == pytest.approx(340 / 175)
    assert deal.after < 1.02


def test_large_batches_take_several_rows_of_a_lane():
    batches = config(4096)
    assert (batches.num_lanes, batches.rows_per_lane) == (1024, 4)
    layout = RowLayout(batches, 5, 4096)
    assert layout.rows[0] == (5,)
    assert layout.planned_lanes == [1], "row 5 is the second of lane 1"
    assert layout.own_lanes == [], "rank 4 keeps lane 1"


def test_many_rows_without_lanes_are_refused():
    with pytest.raises(ValueError, match="multiple of a number from 256 to 1024, the lanes; 1607 is not, 1606 is"):
        config(1607)
