"""What is written about bad samples, and when they are too many."""

import json
import pickle

import pytest

from trichord.core.errors import DataError
from trichord.shards.config import ShardsConfig
from trichord.shards.quarantine import BadSample, QuarantineLog, QuarantineRecord, check_bad_fraction


def _config(**options) -> ShardsConfig:
    return ShardsConfig(sources=[{"name": "a", "shards": "a.tar"}], **options)  # type: ignore[arg-type]


def _record(shard: str, reason: str = "broken image: cut") -> QuarantineRecord:
    return QuarantineRecord(shard, "k/1", 512, "k/1.png", reason, "web", 7)


def test_lines_are_there_at_once(tmp_path):
    log = QuarantineLog(tmp_path / "run" / "quarantine.jsonl")
    log.append([])
    assert not log.path.exists()
    log.append([_record("a.tar"), _record("b.tar")])
    log.append([_record("c.tar")])
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["shard"] for line in lines] == ["a.tar", "b.tar", "c.tar"]
    assert lines[0] == {
        "shard": "a.tar",
        "key": "k/1",
        "offset": 512,
        "member": "k/1.png",
        "reason": "broken image: cut",
        "source": "web",
        "step": 7,
    }


def test_the_fraction_counts_only_after_enough_samples():
    config = _config(max_bad_fraction=0.01, min_samples_for_bad_fraction=1000)
    check_bad_fraction(999, 999, config)
    check_bad_fraction(10, 1000, config)
    with pytest.raises(DataError, match=r"11 of 1000 samples are bad \(1\.10%\).*allows \(1\.00%\)"):
        check_bad_fraction(11, 1000, config)


def test_the_stop_names_the_worst_shards_first():
    records = [_record("one.tar")] + [_record("three.tar")] * 3 + [_record(f"{n}.tar") for n in range(5)]
    with pytest.raises(DataError, match=r"worst: three\.tar of source 'web' \(3\), one\.tar .* and 2 more shards"):
        check_bad_fraction(9, 9, _config(max_bad_fraction=0.0, min_samples_for_bad_fraction=1), records)


def test_the_stop_names_the_commonest_reasons_whatever_their_numbers():
    reasons = ["cut"] * 2 + ["no such field"] + [f"longer than a row: {n} tokens" for n in (310, 27, 8)]
    with pytest.raises(
        DataError, match=r"Commonest here: longer than a row: 310 tokens \(3\); cut \(2\)\. quarantine\.jsonl lists"
    ):
        check_bad_fraction(
            6,
            6,
            _config(max_bad_fraction=0.0, min_samples_for_bad_fraction=1),
            [_record("a.tar", reason) for reason in reasons],
        )


def test_a_bad_sample_crosses_processes():
    bad = pickle.loads(pickle.dumps(BadSample("cut", "0.png")))
    assert (bad.reason, bad.member, str(bad)) == ("cut", "0.png", "0.png: cut")
