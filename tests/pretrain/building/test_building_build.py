"""Shards from rows, folders and tables, and what is said when these are wrong."""

import hashlib
import json
from pathlib import Path

import pytest

from trichord.building.build import BuildRow, build_shards
from trichord.building.folder import rows_from_folder
from trichord.building.table import rows_from_table
from trichord.building.tabular import TableReading
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig, ShardsConfig
from trichord.shards.index import load_header
from trichord.shards.reader import open_sources, read_member


def _samples(paths: list[str]) -> dict[str, dict[str, bytes]]:
    config = ShardsConfig(sources=[{"name": "s", "shards": paths}])  # type: ignore[list-item]
    (table,) = open_sources(config)
    entries = [table.entry(number) for number in range(table.num_samples)]
    assert [entry.problem for entry in entries] == [None] * len(entries)
    return {entry.key: {name: read_member(entry, name, 10**6) for name in entry.members} for entry in entries}


@pytest.fixture
def folder(tmp_path, png, sound) -> Path:
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(png())
    (root / "a" / "1.txt").write_text("one")
    (root / "2.WAV").write_bytes(sound())
    (root / "2.json").write_text("{}")
    (root / "notes.doc").write_text("?")
    (root / ".DS_Store").write_text("?")
    (root / "model.pt").write_text("?")
    return root


def test_a_folder_groups_by_stem(folder, tmp_path):
    paths = build_shards(rows_from_folder(folder, FieldsConfig()), tmp_path / "out")
    samples = _samples(paths)
    assert {key: sorted(members) for key, members in samples.items()} == {
        "2": ["audio", "meta"],
        "a/1": ["image", "text"],
    }
    assert samples["a/1"]["text"] == b"one"
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".idx", ".len", ".tar"]


def test_the_same_rows_give_the_same_bytes_and_webdataset_reads_them(folder, tmp_path):
    import webdataset

    first = build_shards(rows_from_folder(folder, FieldsConfig()), tmp_path / "one")
    second = build_shards(rows_from_folder(folder, FieldsConfig()), tmp_path / "two")
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in first + second]
    assert digests[0] == digests[1]
    read = list(webdataset.WebDataset(first[0], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["2", "a/1"]
    assert read[1]["txt"] == b"one"


def test_shards_are_cut_by_samples_and_by_bytes_into_even_ones(tmp_path):
    rows = [BuildRow(f"{n:03d}", {"txt": b"x" * 100}) for n in range(10)]  # 1,024 bytes each in a tar
    by_samples = build_shards(rows, tmp_path / "a", samples_per_shard=4)
    assert _sizes(by_samples) == [3, 3, 4]
    by_bytes = build_shards(rows, tmp_path / "b", prefix="b", max_bytes=2 * 1024 + 1)
    assert [Path(path).name for path in by_bytes] == [f"b-{n:06d}.tar" for n in range(5)]
    assert list(_samples(by_bytes)) == [row.key for row in rows]
    assert _sizes(build_shards(rows, tmp_path / "c", samples_per_shard=4, even=False)) == [4, 4, 2]


def _sizes(paths: list[str]) -> list[int]:
    return [load_header(path).num_samples for path in paths]


def test_a_csv_table(folder, tmp_path):
    table = folder / "rows.csv"
    table.write_text('image,text,license\na/1.png,"eins, zwei",cc0\n,nur Text,\n', encoding="utf-8")
    samples = _samples(build_shards(rows_from_table(table, TableReading(folder)), tmp_path / "out"))
    assert list(samples) == ["000000000", "000000001"]
    assert samples["000000000"]["text"] == b"eins, zwei"
    assert json.loads(samples["000000000"]["meta"]) == {"license": "cc0"}
    assert sorted(samples["000000001"]) == ["meta", "text"]


def test_a_jsonl_table_without_extra_columns_has_no_meta(folder, tmp_path):
    table = folder / "rows.jsonl"
    table.write_text('{"audio": "2.WAV", "text": "zwei"}\n\n{"text": "naïve", "prompt": "say", "n": 3}\n')
    samples = _samples(build_shards(rows_from_table(table, TableReading(folder)), tmp_path / "out"))
    assert sorted(samples["000000000"]) == ["audio", "text"]
    assert samples["000000001"]["text"].decode() == "naïve"
    assert json.loads(samples["000000001"]["meta"]) == {"prompt": "say", "n": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,text\na/1.png,x\nb/2.png,y\n", r"line 3: column image: no file .*b/2\.png.*relative"),
        ("t.csv", "image,text\na/1.txt,x\n", r"line 2: column image: 'a/1\.txt' ends in '\.txt'; expected jpg"),
        ("t.csv", "image,text\na/1.png\n", r"line 2: expected 2 cells"),
        ("t.csv", "image,text\na/1.png,x,y\n", r"line 2: expected 2 cells"),
        ("t.csv", "picture,caption\n", r"line 1: expected a header .*image, audio, text .*; got picture, caption"),
        ("t.csv", "", r"line 1: expected a header .*got nothing"),
        ("t.csv", 'text\nfirst\n"unclosed\nb\nc\n', r"t\.csv, line 3: a quote opens here and is never closed; quote"),
        ("t.csv", 'text,image\n"a\nb","c\n\nd', r"t\.csv, line 3: a quote opens here and is never closed"),
        ("t.csv", 'text\n"unclosed\nb\n"c"\n', r"line 2: no csv from here to line 4 \('.*; quote cells"),
        ("t.csv", 'text\nfirst\n"a" b\n', r"t\.csv, line 3: no csv \(',' expected .*; quote cells"),
        ("t.csv", "image,text\n,\n", r"line 2: neither image nor audio nor text"),
        ("t.jsonl", '{"text": "x"}\n{"text": x}\n', r"line 2: not JSON at column 10"),
        ("t.jsonl", "[1]\n", r"line 1: expected a JSON object, got list"),
        ("t.jsonl", '{"text": 5}\n', r"line 1: column text: expected text, got 5"),
        ("t.jsonl", '{"audio": "m.pkl"}\n', r"line 1: column audio: 'm\.pkl' ends in '\.pkl'"),
        ("t.xlsx", "", r"t\.xlsx: a table ends in \.csv, \.jsonl, .*; got '\.xlsx'"),
        ("t.parquet", "", r"t\.parquet is no parquet file"),
        ("t.csv", "image,text\n../x.png,x\n", r"line 2: column image: '\.\./x\.png' lies outside of"),
        ("t.csv", "image\nhttps://a.b/c.jpg\n", r"line 2: column image: https://a\.b/c\.jpg is an address; fetch"),
    ],
)
def test_wrong_tables_name_line_and_column(folder, tmp_path, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build_shards(rows_from_table(folder / name, TableReading(folder)), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*")), "nothing half-written may stay"


def test_a_table_that_is_not_there_or_not_utf8(tmp_path):
    with pytest.raises(DataError, match=r"no table .*gone\.csv"):
        list(rows_from_table(tmp_path / "gone.csv", TableReading(tmp_path)))
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe4\n")
    with pytest.raises(DataError, match=r"latin\.csv is not UTF-8"):
        list(rows_from_table(tmp_path / "latin.csv", TableReading(tmp_path)))


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        list(rows_from_folder(tmp_path / "gone", FieldsConfig()))
    (tmp_path / "x.doc").write_text("")
    with pytest.raises(DataError, match=r"no file in .* has a mapped extension"):
        list(rows_from_folder(tmp_path, FieldsConfig()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no sample to write"),
        ([BuildRow("a", {})], "sample 'a': has no member"),
        ([BuildRow("a.b", {"txt": b""})], "sample 'a.b': key 'a.b' with extension 'txt' does not read back"),
        ([BuildRow("a", {"pkl": b""})], "'pkl' means pickled code"),
        ([BuildRow("a", {"txt": b""}), BuildRow("a", {"json": b""})], "two samples in a row have the key 'a'"),
        ([BuildRow("a", {"txt": Path("/nowhere/a.txt")})], "cannot read /nowhere/a.txt"),
    ],
)
def test_rows_that_would_not_read_back_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        build_shards(rows, tmp_path / "out")


def test_existing_shards_are_never_overwritten(tmp_path):
    rows = [BuildRow("a", {"txt": b"x"})]
    build_shards(rows, tmp_path)
    with pytest.raises(ConfigError, match=r"shard-000000\.tar is there already"):
        build_shards(rows, tmp_path)
    build_shards(rows, tmp_path, prefix="more")


def test_progress_counts_samples(tmp_path):
    calls: list[tuple[int, int]] = []
    rows = [BuildRow(str(n), {"txt": b""}) for n in range(4)]
    build_shards(rows, tmp_path, samples_per_shard=2, on_progress=lambda *counts: calls.append(counts))
    assert calls == [(2, 4), (4, 4)]
