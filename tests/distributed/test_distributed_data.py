"""Whole runs whose data is more than a list of shards: sources that grow, rows that are dealt, samples filtered."""

import json
import shutil

import pytest
import yaml
from ranks import RankError, run_ranks
from test_distributed_run import digest, losses
from tiny_run import make_data, train, write_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def data_json(folder):
    return json.loads((folder / "data.json").read_text())


def test_a_source_that_grows_is_the_same_past_for_whoever_resumes(data, tmp_path):
    """2 ranks train, a shard appears, they go on; then 1 rank goes on from the same checkpoint when yet another shard
    has come: the epochs that are recorded are read as they were."""
    shards = shutil.copytree(data, tmp_path / "shards")
    shutil.move(shards / "iat-001.tar", tmp_path / "later.tar")
    for sidecar in shards.glob("iat-001.*"):
        sidecar.unlink()
    root = tmp_path / "grows"
    path = write_config(shards, root)
    config = yaml.safe_load(path.read_text())
    config["shards"] = {
        "window_samples": 4,
        "sources": [{"name": "iat", "shards": f"{shards}/iat-*.tar", "follow": True}],
    }
    path.write_text(yaml.safe_dump(config))
    assert run_ranks(2, train, str(path), "run.max_steps=10") == [0, 0]
    first = data_json(root / "tiny")["samples_per_shard"]
    assert list(first) == [f"{shards}/iat-000.tar"]

    shutil.copy(tmp_path / "later.tar", shards / "iat-001.tar")
    shutil.copytree(root, tmp_path / "again")
    assert run_ranks(2, train, str(path), "run.max_steps=20") == [0, 0]
    second = data_json(root / "tiny")["samples_per_shard"]
    assert second[f"{shards}/iat-001.tar"] > 0
    assert sum(second.values()) > sum(first.values())

    records = root / "tiny" / "shards" / "iat"
    shutil.copytree(records, tmp_path / "again" / "tiny" / "shards" / "iat", dirs_exist_ok=True)
    shutil.copy(tmp_path / "later.tar", shards / "iat-002.tar")
    again = yaml.safe_load(path.read_text()) | {"run": {**config["run"], "root": str(tmp_path / "again")}}
    (tmp_path / "again" / "config.yaml").write_text(yaml.safe_dump(again))
    assert run_ranks(1, train, str(tmp_path / "again" / "config.yaml"), "run.max_steps=20") == [0]
    assert digest(tmp_path / "again" / "tiny") == digest(root / "tiny")


def test_dealing_and_workers_change_neither_the_data_nor_the_losses(data, tmp_path):
    """Rows change hands between ranks, so sums are taken in another order: equal to rounding."""
    found = {}
    for name, *overrides in (
        ("plain", "batches.num_workers=0"),
        ("dealt", "batches.deal_ranks=2", "batches.num_workers=2", "samples.audio.mel=worker"),
    ):
        path = write_config(data, tmp_path / name)
        assert run_ranks(2, train, str(path), "run.max_steps=12", *overrides) == [0, 0]
        found[name] = tmp_path / name / "tiny"
    assert digest(found["plain"]) == digest(found["dealt"])
    plain, dealt = losses(found["plain"]), losses(found["dealt"])
    assert plain.keys() == dealt.keys()
    assert all(dealt[step] == pytest.approx(loss, rel=1e-4) for step, loss in plain.items())
    rows = [json.loads(line) for line in (found["dealt"] / "metrics.jsonl").read_text().splitlines()]
    before = sum(row["data/imbalance_undealt"] for row in rows)
    after = sum(row["data/imbalance"] for row in rows)
    assert after < before


def test_what_filters_leave_out_is_counted_over_ranks(data, tmp_path):
    path = write_config(data, tmp_path / "filtered")
    config = yaml.safe_load(path.read_text())
    config["shards"]["sources"][1]["filters"] = {"min_text_chars": 4}
    path.write_text(yaml.safe_dump(config))
    assert run_ranks(2, train, str(path), "run.max_steps=10") == [0, 0]
    folder = tmp_path / "filtered" / "tiny"
    counted = data_json(folder)["filtered"]["min_text_chars"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert counted == last["data/filtered_samples"] > 0
    assert last["data/bad_samples"] == 0


def test_a_run_without_a_single_sample_stops_and_says_so(data, tmp_path):
    path = write_config(data, tmp_path / "nothing")
    config = yaml.safe_load(path.read_text())
    for source in config["shards"]["sources"]:
        source["filters"] = {"min_text_chars": 99}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(RankError, match="the last 10 steps held not one sample; so far 0 were used, filters left out"):
        run_ranks(2, train, str(path), "run.max_steps=30")
