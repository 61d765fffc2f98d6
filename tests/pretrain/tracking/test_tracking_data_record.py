"""`data.json`: sums over ranks and attempts, and no stale ones."""

import json

from trichord.tracking.data_record import DataRecord


def count(record, shard, number):
    record.add(samples_per_source={"a": number}, samples_per_shard={shard: number}, filtered={"exclude": 1})


def test_sums_over_ranks_and_attempts(tmp_path):
    path = tmp_path / "data.json"
    ranks = [DataRecord(path), DataRecord(path)]
    count(ranks[0], "x.tar", 3)
    count(ranks[1], "y.tar", 2)
    count(ranks[1], "x.tar", 1)
    ranks[0].write(10, [rank.own() for rank in ranks])
    assert json.loads(path.read_text()) == {
        "step": 10,
        "since_step": 0,
        "samples_per_source": {"a": 6},
        "samples_per_shard": {"x.tar": 4, "y.tar": 2},
        "filtered": {"exclude": 3},
    }
    resumed = DataRecord(path, start_step=10)
    count(resumed, "x.tar", 5)
    resumed.write(20, [resumed.own(), DataRecord(path).own()])
    assert json.loads(path.read_text())["samples_per_shard"] == {"x.tar": 9, "y.tar": 2}
    assert json.loads(path.read_text())["since_step"] == 0


def test_a_file_of_another_step_is_not_gone_on_from(tmp_path):
    path = tmp_path / "data.json"
    first = DataRecord(path)
    count(first, "x.tar", 3)
    first.write(12, [first.own()])
    for damage in (path.read_text(), "{", "[]", '{"step": 10}'):
        path.write_text(damage)
        again = DataRecord(path, start_step=10)
        count(again, "x.tar", 1)
        again.write(20, [again.own()])
        fields = json.loads(path.read_text())
        assert (fields["since_step"], fields["samples_per_shard"]) == (10, {"x.tar": 1})
