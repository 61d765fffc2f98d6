"""The packing benchmark's own account, on few samples."""

import pytest

from trichord.benchmarks import packing


@pytest.mark.slow
def test_planned_rows_are_fuller_than_rows_in_order_and_padded_ones(tmp_path):
    rows = packing.bench_packing(tmp_path, num_samples=1500)
    assert [row["samples"] for row in rows] == [1500] * len(packing.CASES), "a sample was lost or came twice"
    assert all(row["padded"] < row["in order"] <= row["planned"] <= 1 for row in rows)


def test_baselines_against_counts_by_hand():
    assert packing._rows_in_order([6, 5, 4, 10, 1], 10) == 4
    assert packing._padded_tokens([3, 5, 2], batch=2) == 12
