"""The step benchmark: its statistics, and one short run of every contestant."""

import json
import math
import random

import pytest

from trichord.benchmarks.step import bench_step, interval_rank, judge_rows, ratio_of

PAIRS = 8  # with the steps to warm up: more than one line of metrics needs


@pytest.mark.parametrize("count", [6, 20, 21, 60])
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    rank = interval_rank(count)
    outside = 2 * sum(math.comb(count, i) for i in range(rank + 1)) / 2**count  # P(fewer than rank + 1 below)
    assert 1 - outside >= 0.95
    narrower = 2 * sum(math.comb(count, i) for i in range(rank + 2)) / 2**count
    assert 1 - narrower < 0.95, "a narrower interval would do"


def test_a_ratio_is_taken_pair_by_pair():
    rng = random.Random(0)
    load = [rng.uniform(1, 10) for _ in range(21)]  # a machine that is busy now and then
    ratio = ratio_of([1.1 * x for x in load], load)
    assert ratio.median == pytest.approx(1.1)
    assert ratio.high - ratio.low < 1e-9


def test_a_slow_loop_is_judged_slow():
    slow = {"comparison": "stage 1: trichord / deepspeed", "ratio": 1.2, "from": 1.1, "to": 1.3}
    padded = {"comparison": "ragged texts, per useful token: trichord / trainer", "ratio": 0.5, "from": 0.4, "to": 0.6}
    assert [target["met"] for target in judge_rows([slow, padded])] == [False, False, True]


@pytest.mark.distributed
@pytest.mark.slow
def test_every_contestant_takes_its_steps(tmp_path):
    rows = bench_step(tmp_path, [1], 2, PAIRS, lambda line: None, num_layers=1, row_tokens=256)
    assert [row["pairs"] for row in rows] == [PAIRS] * 4
    assert all(row["from"] <= row["ratio"] <= row["to"] for row in rows)
    lines = (tmp_path / "stage-1" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 10, "our contestant records as the loop does"
