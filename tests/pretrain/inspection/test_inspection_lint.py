"""`trichord data lint` finds every planted fault, says which samples to leave out, and nothing else."""

import json
import os
import re
import shutil
import time

import pytest
from inspection_corpus import BAD_IN_FAULTY, pairs, png, write_tar

from trichord.cli import main
from trichord.core.errors import ConfigError, DataError
from trichord.inspection.lint import lint
from trichord.inspection.processes import Processes
from trichord.inspection.target import find_target
from trichord.shards.config import StorageConfig
from trichord.shards.patience import settings
from trichord.shards.storage import configure_storage


@pytest.fixture
def data(faulty, tmp_path):
    """A copy of the faulty shards."""
    return shutil.copytree(faulty, tmp_path / "data")


def notes(report) -> dict[str, str]:
    """What is odd about the first source: kind -> details."""
    return {what: detail for what, _, detail in report.sources[0].notes}


def test_every_planted_fault_is_found_and_no_good_sample_is_blamed(data, tmp_path):
    out = tmp_path / "bad.jsonl"
    report = lint(find_target([str(data)]), out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    bad = {line["key"]: line for line in lines}
    assert set(bad) == {*BAD_IN_FAULTY, "0003"}  # the pickle alone is a sample of nothing
    for key, words in BAD_IN_FAULTY.items():
        assert words in bad[key]["reason"] or words == "meta", bad[key]
        assert bad[key]["shard"] == str(data / "a-000.tar")
    assert "not JSON" in bad["bad-json"]["reason"]
    assert bad["cut-picture"]["member"] == "cut-picture.png"
    assert report.samples == 20 + len(BAD_IN_FAULTY) + 2 + 60 + 20
    assert report.bad == len(lines) == len(BAD_IN_FAULTY) + 1


def test_what_is_odd_about_shards_is_noted(data):
    found = notes(lint(find_target([str(data)])))
    assert "0003, 0000" in found["key comes back"]
    assert "1 members: 0003.pkl" in found["pickled code, ignored"]
    assert found["files of no sample"].startswith("1 names")
    assert "is cut: it needs" in found["damaged"]
    assert "missing" in found["sidecars"]
    assert not os.path.exists(data / "pwned")


def test_reasons_are_grouped_by_whole_keys_alone(tmp_path):
    """`e` stands in every word of a message, and is the key of neither."""
    broken = [(f"{key}.json", b"{no json") for key in ("e", "o", "in/e")]
    twice = [(name, png(1)) for name in ("e2.png", "e2.png", "in/o2.png", "in/o2.png")]
    source = lint(find_target([str(write_tar(tmp_path / "s.tar", [*broken, *twice]))])).sources[0]
    assert {reason.count for reason in source.reasons.values()} == {3, 2}
    words = " ".join(source.reasons)
    assert "enclosed in double quotes" in words
    assert "two members with extension 'png', the second is 'KEY.png'" in words


def test_stale_and_false_sidecars_are_told_from_fresh_ones(tmp_path):
    shard = write_tar(tmp_path / "s.tar", pairs(4))
    target = find_target([str(shard)])
    lint(target)
    assert "sidecars" not in notes(lint(target))
    write_tar(shard, pairs(5))
    assert "stale" in notes(lint(target))["sidecars"]
    assert "sidecars" not in notes(lint(target))
    times = os.stat(shard)
    swapped = pairs(5)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    write_tar(shard, swapped)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "do not match the tar" in notes(lint(target))["sidecars"]


def test_keys_and_names_that_stand_in_several_shards(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", pairs(4))
    write_tar(tmp_path / "b" / "0.tar", pairs(4, 3))
    found = notes(lint(find_target([str(tmp_path / "*" / "0.tar")])))
    assert "1 keys: '0003' in 2 shards" in found["key in several shards"]
    assert "0.tar" in found["same base name"]
    write_tar(tmp_path / "b" / "0.tar", pairs(9))
    write_tar(tmp_path / "a" / "0.tar", pairs(9))
    found = notes(lint(find_target([str(tmp_path / "*" / "0.tar")])))["key in several shards"]
    assert found.startswith("9 keys: ")
    assert re.findall(r"'(\d+)' in 2 shards", found) == ["0000", "0001", "0002", "0003", "0004"]


def test_exit_codes_tables_and_json(data, tmp_path, capsys):
    good = ["data", "lint", str(data / "a-001.tar"), "--workers", "1"]
    assert main(good) == 0
    assert "0 of 60 samples are bad (0.00%), 1.00% are allowed\n" in capsys.readouterr().out
    file = tmp_path / "lint.json"
    assert main(["data", "lint", str(data), "--json", str(file), "--workers", "1"]) == 3
    printed = capsys.readouterr().out
    assert "training would stop" in printed
    assert "key comes back" in printed
    report = json.loads(file.read_text())
    reasons = {reason["reason"]: reason for reason in report["sources"][0]["reasons"]}
    assert reasons["the image cannot be decoded: image file is truncated"]["examples"][0]["key"] == "cut-picture"
    assert sum(reason["count"] for reason in reasons.values()) == report["bad"]


@pytest.mark.slow  # two more processes that import torch
def test_results_do_not_depend_on_the_number_of_processes(data, tmp_path):
    target = find_target([str(data)])
    lint(target, out=tmp_path / "warm")  # makes the sidecars
    reports = [lint(target, workers, tmp_path / str(workers)).to_json() for workers in (1, 2)]
    assert reports[0] == reports[1]
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


def test_a_share_that_is_allowed_passes(configured, data, monkeypatch):
    monkeypatch.chdir(configured)
    words = ["c.yaml", f"shards.sources.cats.shards={data}/*.tar", "shards.sources.dogs.shards=good/dogs-*.tar"]
    report = lint(find_target([*words, "shards.max_bad_fraction=0.01"]))
    assert report.fails
    assert not lint(find_target([*words, "shards.max_bad_fraction=0.5"])).fails


def test_with_a_config_samples_are_judged_as_training_would(configured, tmp_path, monkeypatch):
    monkeypatch.chdir(configured)
    members = [
        *pairs(3, label="cat"),
        ("wordy.txt", b"thing " * 100),
        ("odd.txt", b"x"),
        ("odd.json", b'{"kind": "cow"}'),
    ]
    write_tar(tmp_path / "s.tar", [*members, *pairs(2, 7, label="dog")])
    words = ["c.yaml", f"shards.sources.cats.shards={tmp_path}/s.tar"]
    report = lint(find_target([*words, "shards.sources.cats.filters={min_text_chars: 3}"]))
    source = report.sources[0]
    assert source.filtered == {"min_text_chars": 1, "longer than a row": 1}
    assert not source.reasons
    reasons = lint(find_target(words)).sources[0].reasons
    assert any("is none of its" in text for text in reasons)
    report = lint(find_target([*words, "shards.sources.cats.require=[audio]"]))
    assert report.sources[0].reasons["the sample has no audio, which source 'cats' requires"].count == 5


def test_the_list_of_bad_samples_makes_the_rest_clean(configured, data, tmp_path, monkeypatch):
    monkeypatch.chdir(configured)
    words = ["c.yaml", f"shards.sources.cats.shards={data}/*.tar", "samples.targets={}"]
    out = tmp_path / "bad.jsonl"
    first = lint(find_target(words), out=out)
    keys = {json.loads(line)["key"] for line in out.read_text().splitlines()}
    assert keys == {*BAD_IN_FAULTY, "0003"}
    second = lint(find_target([*words, f"shards.sources.cats.filters.exclude=[{out}]"]))
    assert second.bad == 0
    assert second.sources[0].filtered["exclude"] >= first.bad


def test_sources_and_shards_that_cannot_be_read_fail_and_the_rest_is_looked_at(tmp_path, capsys):
    good = write_tar(tmp_path / "good.tar", pairs(3))
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    assert main(["data", "lint", str(good), str(tmp_path / "page.tar"), "--workers", "1"]) == 3
    printed = capsys.readouterr().out
    assert "is no tar file" in printed
    assert "0 of 3 samples are bad" in printed
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    assert main(["data", "lint", str(tmp_path / "packed.tar")]) == 3
    printed = capsys.readouterr().out
    assert "compressed with gzip" in printed
    assert "no samples in" not in printed  # there may be many, and their names are not at fault
    (tmp_path / "s.tar.bz2").write_bytes(b"BZh9" + bytes(600))
    assert main(["data", "lint", str(tmp_path / "s.tar.bz2")]) == 3
    assert "bunzip2" in capsys.readouterr().out
    write_tar(tmp_path / "empty.tar", [])
    assert main(["data", "lint", str(tmp_path / "empty.tar")]) == 3
    assert "no samples in 1 shards" in capsys.readouterr().out
    assert main(["data", "lint", str(tmp_path / "none-*.tar")]) == 3
    assert "no shard matches" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert main(["data", "lint", str(tmp_path / "none")]) == 3
    assert "holds none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{folder}/x.tar", "c.yaml"], "expected shards only"),
        (["none.yaml"], "no such file"),
        (["{folder}/none/at-all"], "there are no such shards .no file or folder of that name in .*not there either"),
        (["{folder}/none"], "there are no such shards .* and no shipped config of that name; nearest"),
        ([], "expected a config, or shards"),
    ],
)
def test_wrong_words_are_answered(tmp_path, words, expected):
    with pytest.raises(ConfigError, match=expected):
        find_target([word.format(folder=tmp_path) for word in words])


def test_a_file_that_cannot_be_written_is_a_mistake_of_the_user(data, capsys):
    assert main(["data", "lint", str(data / "a-001.tar"), "--out", str(data / "no" / "bad.jsonl")]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_process_that_dies_is_named_and_not_waited_for():
    with (
        Processes(2, StorageConfig()) as processes,
        pytest.raises(DataError, match=r"a process died .* near 3; with --workers 1"),
    ):
        list(processes.run(_die_at_three, range(9)))


def _die_at_three(number: int) -> int:
    if number == 3:
        time.sleep(0.3)  # let the results of the others come first
        os._exit(7)
    return number


def test_jobs_are_taken_only_as_fast_as_results_are():
    taken = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield number

    with Processes(2, StorageConfig()) as processes:
        for job, result in processes.run(abs, jobs()):
            assert job == result
            assert len(taken) - job <= 9


def test_workers_read_as_the_config_says(tmp_path):
    storage = StorageConfig(attempts=3, cache_dir=str(tmp_path))
    with Processes(2, storage) as processes:
        found = [attempts for _, attempts in processes.run(_attempts, range(4))]
    assert found == [3] * 4
    assert _attempts(0) == 3
    configure_storage(StorageConfig())


def _attempts(_: int) -> int:
    return settings().attempts
