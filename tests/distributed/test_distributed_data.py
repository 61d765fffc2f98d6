"""Whole runs whose data is more than a list of shards: sources that grow, rows that are dealt, samples filtered."""

import io
import json
import re
import shutil
import tarfile

import pytest
import yaml
from ranks import RankError, run_ranks
from test_distributed_run import digest, losses
from tiny_run import make_data, train, write_config

from trichord.checkpoints.load import find_latest
from trichord.core.status import read_status
from trichord.tracking.metrics import read_events, read_metrics

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


def test_sources_that_are_used_up_end_the_run_with_each_sample_accounted_for(data, tmp_path):
    """Two sources once, one twice, filters on one of them, clips that are longer than a row. The run stops when one
    source is used up, goes on to the end, and is started again."""
    path = write_config(data, tmp_path / "ends")
    config = yaml.safe_load(path.read_text())
    it, at, iat = config["shards"]["sources"]
    it["epochs"] = at["epochs"] = 1
    iat["epochs"] = 2
    at["filters"] = {"min_text_chars": 4}
    config["batches"] |= {"row_tokens": 10, "rows_per_step": 8, "micro_rows": 4}
    config["shards"] |= {"min_samples_for_bad_fraction": 1, "max_bad_fraction": 0.0}
    path.write_text(yaml.safe_dump(config))
    assert run_ranks(2, train, str(path), "run.max_steps=17") == [0, 0]
    assert run_ranks(1, train, str(path), "run.max_steps=500") == [0]
    folder = tmp_path / "ends" / "tiny"
    rows = read_metrics(folder)
    assert all(row["train/loss"] > 0 and row["train/grad_norm"] > 0 for row in rows)
    filtered = data_json(folder)["filtered"]
    assert filtered.keys() == {"min_text_chars", "longer than a row"}
    assert rows[-1]["data/filtered_samples"] == sum(filtered.values())
    assert rows[-1]["data/bad_samples"] == 0
    assert rows[-1]["train/samples_seen"] + sum(filtered.values()) == 40 + 40 + 2 * 40
    steps = find_latest(folder / "checkpoints").name
    events = read_events(folder)
    end = events[-1]
    assert end["kind"] == "end"
    assert (end["finished"], end["checkpoint_saved"], end["signal"]) == (True, True, None)
    assert end["reason"] == f"all sources used up at step {end['step']} (run.max_steps 500)"
    assert steps == f"step-{end['step']:06d}"
    told = [event for event in events if event["kind"] == "source_used_up"]
    assert sorted(event["source"] for event in told) == ["at", "iat", "it"]
    used_up = {event["source"]: event["step"] for event in told}
    assert used_up["it"] <= 17 < used_up["iat"] <= end["step"]

    assert run_ranks(1, train, str(path), "run.max_steps=3") == [0]  # whatever is asked for now
    assert find_latest(folder / "checkpoints").name == steps
    assert read_status(folder).outcome == "finished"
    assert read_metrics(folder) == rows
    again = [event for event in read_events(folder)[len(events) :] if event["kind"] in ("end", "source_used_up")]
    assert [event["reason"] for event in again] == [f"all sources used up at step {end['step']} (run.max_steps 3)"]
    assert "more epochs are a new run" in (folder / "logs" / "rank-00000.log").read_text()


def test_too_much_bad_data_stops_all_ranks_and_names_the_worst_shard(data, tmp_path):
    """Whichever rank comes across them: the records of the whole run are looked at."""
    shards = shutil.copytree(data, tmp_path / "shards")
    with tarfile.open(shards / "at-001.tar", "w") as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"a{number:04d}.txt")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\xe9\xe9\xe9\xe9"))
    path = write_config(shards, tmp_path / "bad")
    told = r"worst: \S+/at-001.tar of source 'at' \(\d+\)\. Commonest: text: .* Of the first: their bytes are damaged"
    with pytest.raises(RankError, match=told) as stopped:
        run_ranks(2, train, str(path), "shards.min_samples_for_bad_fraction=30", "shards.max_bad_fraction=0.001")
    assert len(re.findall(told, str(stopped.value))) == 2, "on both ranks"
    assert read_status(tmp_path / "bad" / "tiny").exit_code == 3


def test_a_run_without_a_single_sample_stops_and_says_so(data, tmp_path):
    path = write_config(data, tmp_path / "nothing")
    config = yaml.safe_load(path.read_text())
    for source in config["shards"]["sources"]:
        source["filters"] = {"min_text_chars": 99}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(RankError, match="the last 10 steps held not one sample; so far 0 were used, filters and"):
        run_ranks(2, train, str(path), "run.max_steps=30")
    rows = read_metrics(tmp_path / "nothing" / "tiny")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert not any(name.startswith(("train/loss", "train/grad_norm")) for row in rows for name in row)
