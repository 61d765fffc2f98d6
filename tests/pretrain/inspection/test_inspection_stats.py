"""`trichord data stats` counts what is there, once, whatever the number of processes."""

import json
import random
import re

import numpy as np
import pytest
from inspection_corpus import BAD_IN_FAULTY, pairs, png, wav, write_tar

from trichord.cli import main
from trichord.core.errors import ConfigError, DataError
from trichord.inspection.collect import Wishes
from trichord.inspection.distribution import Distribution
from trichord.inspection.repeats import Repeats
from trichord.inspection.stats import gather_stats
from trichord.inspection.target import find_target


def stats_of(words, wishes=None, **options) -> dict:
    return gather_stats(find_target(words), wishes or Wishes(), **options).to_json()


def test_counts_sizes_and_lengths_are_those_of_the_files(tmp_path):
    members = [
        ("a.png", png(1, (40, 20))),
        ("a.txt", b"four"),
        ("b.png", png(2, (10, 30))),
        ("b.wav", wav(8000, 16_000)),
        ("c.wav", wav(4410, 44_100)),
        ("c.txt", "größer".encode()),
        ("c.npy", b"12345"),
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    total = stats_of([str(shard)])["total"]
    assert (total["samples"], total["shards"], total["bytes"]) == (3, 1, shard.stat().st_size)
    assert total["members"]["png"] == {"count": 2, "bytes": len(members[0][1]) + len(members[2][1])}
    assert total["members"]["npy"] == {"count": 1, "bytes": 5}
    assert (total["image_width"]["min"], total["image_width"]["max"], total["image_width"]["mean"]) == (10, 40, 25)
    assert (total["image_pixels"]["sum"], total["image_aspect"]["max"]) == (1100, 2)
    assert total["audio_seconds"]["sum"] == pytest.approx(0.6)
    assert total["audio_rates"] == {"16000": 1, "44100": 1}
    assert (total["text_chars"]["min"], total["text_chars"]["max"]) == (4, 6)
    assert (total["images_per_sample"]["count"], total["images_per_sample"]["sum"]) == (3, 2)
    assert total["text_tokens"] == {"count": 0}


def test_bad_samples_are_counted_apart_and_unsafe_members_only_as_members(faulty):
    total = stats_of([str(faulty / "a-000.tar")])["total"]
    by_index = {"no-picture", "bad-text", "twice", "alien", "0003"}  # the others only show when they are decoded
    assert by_index - {"0003"} < set(BAD_IN_FAULTY)
    assert total["bad_by_index"] == len(by_index)
    assert total["samples"] == 20 + len(BAD_IN_FAULTY) + 2 - len(by_index)
    assert total["members"]["pkl"]["count"] == 1


def test_sources_tokens_and_classes_of_a_config(configured, monkeypatch):
    monkeypatch.chdir(configured)
    stats = stats_of(["c.yaml"], Wishes(labels=("kind", "no.such")))
    cats, dogs = stats["sources"]
    assert (cats["name"], cats["samples"], dogs["samples"], dogs["weight"]) == ("cats", 40, 10, 2)
    assert cats["labels"]["kind"] == {"classes": {"cat": 40}, "missing": 0, "other": 0}
    assert stats["total"]["labels"]["kind"]["classes"] == {"cat": 40, "dog": 10}
    assert stats["total"]["labels"]["no.such"]["missing"] == 50
    assert stats["tokens_of"] == "all"
    tokens = stats["total"]["text_tokens"]
    assert (tokens["count"], tokens["min"], tokens["max"]) == (50, 5, 5)  # thing N of the world
    # [BOS], four patches, as many audio tokens as there are, the text, [EOS]
    assert stats["total"]["sample_tokens"]["min"] == 1 + 5 + 1 + in_stream(configured)


def test_a_label_that_no_sample_has_is_told_with_the_keys_there_are(tmp_path, capsys):
    members = [(f"{n}.json", json.dumps({"class": n % 2, "split": {"name": "a"}}).encode()) for n in range(4)]
    shard = write_tar(
        tmp_path / "s.tar", sorted([*members, *((f"{n}.txt", b"a") for n in range(5)), ("0.gif", b"GIF8")])
    )
    assert main(["data", "stats", str(shard), "--label", "clazz", "--json", str(tmp_path / "s.json")]) == 0
    told = json.loads((tmp_path / "s.json").read_text())["warnings"]
    assert told[1] == {
        "source": "label clazz",
        "warning": "no sample of 5 has it; their json members have the keys class (4), split.name (4)",
    }
    assert ".gif are mapped to no field" in told[0]["warning"]
    assert told[1]["warning"] in capsys.readouterr().err
    assert stats_of([str(shard)], Wishes(labels=("class", "split.name")))["warnings"] == told[:1]


def in_stream(folder) -> int:
    """Stream tokens of an image in a model of towers only."""
    from trichord.config.load import load_run_config
    from trichord.restore import item_lengths

    grid = item_lengths(load_run_config(folder / "c.yaml")).image(16, 16)
    return grid[0] * grid[1]


def test_a_sample_of_the_texts_stands_for_all(configured, monkeypatch):
    monkeypatch.chdir(configured)
    monkeypatch.setattr("trichord.inspection.stats.SAMPLED_TEXTS", 20)
    words = ["good/cats-0.tar"]
    some = stats_of(words, Wishes(tokenizer="tok"))
    assert some["tokens_of"] == "sample"
    assert 8 <= some["total"]["text_tokens"]["count"] <= 32
    assert some == stats_of(words, Wishes(tokenizer="tok"))
    assert stats_of(words, Wishes(tokenizer="tok"), every_text=True)["total"]["text_tokens"]["count"] == 40


def test_filters_of_a_config_are_heeded(configured, monkeypatch):
    monkeypatch.chdir(configured)
    stats = stats_of(["c.yaml", "shards.sources.cats.filters={max_audio_seconds: 0.06}"])
    assert stats["sources"][0]["filtered"] == {"max_audio_seconds": 6}
    assert stats["sources"][0]["samples"] == 34
    stats = stats_of(["c.yaml", "shards.sources.cats.filters={meta: [{key: kind, one_of: [dog]}]}"])
    assert (stats["sources"][0]["samples"], stats["sources"][0]["filtered"]) == (0, {"meta kind": 40})


def test_equal_contents_are_found_across_shards_and_the_first_one_stays(tmp_path):
    write_tar(tmp_path / "s-0.tar", [*pairs(5), ("x.txt", b"the same words")])
    write_tar(tmp_path / "s-1.tar", [*pairs(3, 3), ("y.txt", b"the same words"), ("z.txt", b"other words")])
    out = tmp_path / "dup.jsonl"
    stats = stats_of([str(tmp_path)], duplicates=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(line["key"], line["duplicate_of"]["key"]) for line in lines}
    assert found == {("0003", "0003"), ("0004", "0004"), ("y", "x")}
    assert all(line["shard"].endswith("s-1.tar") for line in lines)
    assert all(line["duplicate_of"]["shard"].endswith("s-0.tar") for line in lines)
    assert stats["total"]["duplicates"] == 3
    without = stats_of([str(tmp_path)], Wishes(hashes=False))
    assert (without["duplicates_of"], without["total"]["duplicates"]) == ("none", 0)


def test_the_list_of_duplicates_leaves_them_out(configured, tmp_path, monkeypatch):
    monkeypatch.chdir(configured)
    write_tar(tmp_path / "s-0.tar", pairs(5))
    write_tar(tmp_path / "s-1.tar", pairs(3, 3))
    words = ["c.yaml", f"shards.sources.cats.shards={tmp_path}/s-*.tar"]
    out = tmp_path / "dup.jsonl"
    assert stats_of(words, duplicates=out)["sources"][0]["duplicates"] == 2
    again = stats_of([*words, f"shards.sources.cats.filters.exclude=[{out}]"])["sources"][0]
    assert (again["duplicates"], again["samples"], again["filtered"]) == (0, 6, {"exclude": 2})


def test_figures_do_not_depend_on_the_number_of_processes(faulty, tmp_path):
    words = [str(faulty / "a-00[01].tar")]
    outs = [tmp_path / "1", tmp_path / "2"]
    results = [stats_of(words, duplicates=out, workers=n) for n, out in enumerate(outs, start=1)]
    assert results[0] == results[1]
    assert outs[0].read_text() == outs[1].read_text()


def test_command_line_table_json_and_page(configured, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(configured)
    file, page = tmp_path / "s.json", tmp_path / "s.html"
    assert main(["data", "stats", "c.yaml", "--json", str(file), "--html", str(page), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"cats +1 +40 ", printed)
    assert json.loads(file.read_text())["total"]["samples"] == 50
    html = page.read_text()
    assert "Classes of kind" in html  # the targets of the config are counted unasked
    assert html.count("<svg") >= 6
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)
    assert "http" not in re.sub(r"https?://www.w3.org[^\"]*", "", html)


def test_page_escapes_what_users_wrote(tmp_path, capsys):
    members = [("a.txt", b"x"), ("a.json", b'{"k": "<script>alert(1)</script>"}')]
    shard = write_tar(tmp_path / "<script>" / "s.tar", members)
    page = tmp_path / "p.html"
    assert main(["data", "stats", str(shard), "--label", "k", "--html", str(page), "--workers", "1"]) == 0
    assert "<script" not in page.read_text()


def test_what_cannot_be_read_stops_it_with_a_hint(tmp_path, capsys):
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    assert main(["data", "stats", str(tmp_path / "page.tar"), "--workers", "1"]) == 3
    assert "trichord data lint" in capsys.readouterr().err
    with pytest.raises(DataError, match="no samples in 1 shards"):
        stats_of([str(write_tar(tmp_path / "empty.tar", []))])
    assert main(["data", "stats", str(tmp_path / "x.tar"), "--duplicates", "d", "--no-hashes"]) == 2
    assert "--no-hashes" in capsys.readouterr().err
    write_tar(tmp_path / "s.tar", pairs(2))
    assert main(["data", "stats", str(tmp_path / "s.tar"), "--duplicates", str(tmp_path / "no" / "d")]) == 2
    with pytest.raises(ConfigError, match="nothing is at"):
        stats_of([str(tmp_path / "s.tar")], Wishes(tokenizer="./none"))


def test_quantiles_are_within_half_a_percent_and_the_rest_is_exact():
    rng = random.Random(3)
    values = [rng.lognormvariate(3, 2) for _ in range(5000)]
    halves = Distribution(), Distribution()
    for half, part in zip(halves, (values[:1234], values[1234:])):
        half.extend(part)
    halves[0].merge(halves[1])
    spread = halves[0]
    assert (spread.count, spread.least, spread.most) == (5000, min(values), max(values))
    assert spread.total == pytest.approx(sum(values))
    for percent in (1, 25, 50, 75, 99):
        exact = float(np.quantile(values, percent / 100, method="inverted_cdf"))
        assert spread.quantile(percent) == pytest.approx(exact, rel=0.0055)
    assert sum(count for _, _, count in spread.columns()) == pytest.approx(5000, abs=40)


def test_small_whole_numbers_are_exact_and_have_a_column_each():
    spread = Distribution()
    spread.extend([0, 0, 1, 2, 2, 2, 7])
    assert [spread.quantile(percent) for percent in (1, 50, 90, 100)] == [0, 2, 7, 7]
    assert [round(count) for _, _, count in spread.columns()] == [2, 1, 3, 0, 0, 0, 0, 1]
    assert Distribution().to_json() == {"count": 0}
    spread = Distribution()
    spread.extend([60] * 100 + [80])
    assert spread.columns()[0] == (59.5, 60.5, 100)
    spread = Distribution()
    spread.extend(range(1000, 1031))  # bins of eleven numbers
    assert all(count for _, _, count in spread.columns()[1:-1])
    for value in range(1, 90):
        one = Distribution()
        one.extend([0, value, 100])
        assert one.quantile(50) == value


def test_repeats_finds_exactly_the_hashes_that_repeat():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (3000, 2), dtype=np.uint64)
    hashes[2500] = hashes[7]
    hashes[2999] = hashes[7]
    hashes[100] = hashes[2000]
    hashes[50, 0] = hashes[51, 0]  # half a hash is no hash
    with Repeats() as repeats:
        for shard in range(3):
            part = slice(1000 * shard, 1000 * shard + 1000)
            repeats.add(hashes[part].tobytes(), shard, np.arange(1000))
        assert sorted(repeats.groups()) == [[(0, 7), (2, 500), (2, 999)], [(0, 100), (2, 0)]]
