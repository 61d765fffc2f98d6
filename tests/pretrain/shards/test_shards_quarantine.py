"""What is written about bad samples, and when they are too many."""

import json
import pickle
from dataclasses import replace

import pytest

from trichord.core.errors import DataError
from trichord.shards import quarantine
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
    check_bad_fraction(999, 999, config, [])
    check_bad_fraction(10, 1000, config, [])
    with pytest.raises(DataError, match=r"11 of 1000 samples are bad \(1\.10%\).*allows \(1\.00%\); quarantine\.jsonl"):
        check_bad_fraction(11, 1000, config, [])


def test_the_stop_names_the_worst_shards_first():
    records = [_record("one.tar")] + [_record("three.tar")] * 3 + [_record(f"{n}.tar") for n in range(5)]
    with pytest.raises(DataError, match=r"worst: three\.tar of source 'web' \(3\), one\.tar .* and 2 more shards"):
        check_bad_fraction(9, 9, _config(max_bad_fraction=0.0, min_samples_for_bad_fraction=1), records)


def test_the_stop_names_the_commonest_reasons_whatever_their_numbers():
    reasons = ["cut"] * 2 + ["no such field"] + [f"longer than a row: {n} tokens" for n in (310, 27, 8)]
    with pytest.raises(DataError, match=r"Commonest: longer than a row: 310 tokens \(3\); cut \(2\)\. Of the first: "):
        _stop([_record("a.tar", reason) for reason in reasons])


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("the text has 9000 characters; samples.text.max_chars allows 600", "that key is too small"),
        ("the audio is 40.00 s long; samples.audio.max_seconds allows 30", "that key is too small"),
        ("70000000 bytes, more than shards.max_member_bytes 67108864", "that key is too small"),
        ("the sample has no audio, which source 'web' requires", "`fields` and `require`"),
        ("the sample has none of audio, image; it has text", "`fields` and `require`"),
        ("target group: `group` must be a finite float32 number, got 'seven'", "samples.targets"),
        ("the metadata is not JSON: Expecting value", "their json is not what"),
        ("the image cannot be decoded: image file is truncated", "their bytes are damaged"),
        ("cut: 10 of 20 bytes are there", "their bytes are damaged"),
    ],
)
def test_the_stop_says_what_to_do_about_the_commonest_reason(reason, cure):
    with pytest.raises(DataError) as stopped:
        _stop([_record("a.tar", "unlike any other"), *[_record("a.tar", reason)] * 2])
    assert cure in str(stopped.value).split("Of the first: ")[1]
    assert str(stopped.value).endswith("To go on with this run as it is, raise shards.max_bad_fraction")


def _stop(records):
    config = _config(max_bad_fraction=0.0, min_samples_for_bad_fraction=1)
    check_bad_fraction(len(records), len(records), config, records)


def test_what_is_read_back_has_each_sample_once_up_to_a_step(tmp_path, monkeypatch):
    """A step that is done again writes its lines again; an attempt may have been further; a crash may tear a line."""
    log = QuarantineLog(tmp_path / "quarantine.jsonl")
    assert log.read(9) == []
    records = [replace(_record("a.tar"), key=f"k{step}", step=step) for step in range(1, 6)]
    log.append([QuarantineRecord("b.tar", None, None, None, "damaged", "web"), *records, *records[2:4]])
    with log.path.open("a") as file:
        file.write('{"shard": "a.t')
    assert log.read(4) == records[:4]
    monkeypatch.setattr(quarantine, "_MAX_READ_BYTES", log.path.stat().st_size // 3)
    assert log.read(9) == records[2:4]


def test_a_bad_sample_crosses_processes():
    bad = pickle.loads(pickle.dumps(BadSample("cut", "0.png")))
    assert (bad.reason, bad.member, str(bad)) == ("cut", "0.png", "0.png: cut")
