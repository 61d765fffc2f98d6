"""Columns that the user names must be there, what became of the others is told, and clips may be arrays."""

import io
import json
import logging
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from building_world import chats, members, put, write_parquet

from trichord.building.build import Layout, build
from trichord.building.kinds import ConvertOptions, source_identity, source_rows
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig

LINES = '{"text": "a", "caption": "b"}\n{"caption": "d", "more": 1}\n'


def convert(source, kind="table", on_bad: Literal["stop", "skip"] = "stop", **column):
    options = ConvertOptions(column=column)
    rows = source_rows(source, kind, options, FieldsConfig())
    identity = source_identity(source, kind, options)
    return build(rows, source.parent / "out", Layout(), identity=identity, on_bad=on_bad)


@pytest.mark.parametrize(
    ("name", "kind", "named", "there"),
    [
        ("t.csv", "table", {"text": "capton"}, "t.csv, line 1; there are text, caption"),
        ("t.jsonl", "table", {"image": "capton"}, "any row of .*t.jsonl; there are text, caption, more"),
        ("t.jsonl", "text", {"audio": "capton"}, "any row of .*t.jsonl; there are text, caption, more"),
        ("t.json", "llava", {"image": "capton"}, "any row of .*t.json; there are id, image, conversations, audio"),
        ("t.parquet", "table", {"text": "capton"}, "t.parquet; there are image, label, caption"),
        ("t.parquet", "huggingface", {"audio": "capton"}, "t.parquet; there are image, label, caption"),
    ],
)
def test_a_column_that_is_nowhere_is_an_error_before_any_shard(tmp_path, name, kind, named, there):
    put(tmp_path / "t.csv", "text,caption\na,b\n")
    put(tmp_path / "t.jsonl", LINES)
    put(tmp_path / "t.json", chats())
    write_parquet(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=rf"--column \w+=capton: no column capton in .*{there}"):
        convert(tmp_path / name, kind, on_bad="skip", **named)
    assert not list((tmp_path / "out").rglob("*")), "neither shards nor a plan of them may stay"


def test_a_column_that_some_rows_lack_is_fine_and_the_first_row_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trichord"):
        result = convert(put(tmp_path / "t.jsonl", LINES), on_bad="skip", text="text")
    assert (result.samples, len(result.left_out)) == (1, 1)
    assert "no column text among caption, more" in result.left_out[0][1]
    assert "t.jsonl, first row: text from column text; in json: caption" in caplog.text


def test_without_named_columns_the_line_says_how_to_name_them(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trichord"):
        convert(put(tmp_path / "t.csv", "text,caption\na,b\n"))
    assert "t.csv: text from column text; in json: caption (another is named by --column text=caption)" in caplog.text


def test_columns_say_nothing_about_plain_text(tmp_path):
    with pytest.raises(ConfigError, match=r"--column names a key of \.jsonl; .*t\.txt holds plain text"):
        convert(put(tmp_path / "t.txt", "words"), "text", text="body")


def test_clips_as_arrays_become_wav_files_of_the_same_samples(tmp_path):
    samples = (np.arange(-400, 400) * 41 / 32768).tolist()  # as 16-bit sound is decoded
    rows = [{"path": None, "array": samples, "sampling_rate": 8000}, None]
    pq.write_table(pa.table({"audio": rows, "text": ["a", "b"]}), tmp_path / "t.parquet")
    result = convert(tmp_path / "t.parquet", "huggingface")
    one, two = members(result.paths).values()
    assert (sorted(one), sorted(two)) == (["txt", "wav"], ["txt"])
    waveform, rate = soundfile.read(io.BytesIO(one["wav"]), dtype="float32")
    assert rate == 8000
    assert (waveform == np.float32(samples)).all()


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ({"array": [0.0], "sampling_rate": None}, "sampling_rate: expected a whole number"),
        ({"array": [[0.0], [1.0]], "sampling_rate": 8000}, "array: expected a list of numbers, one channel"),
        ({"array": [float("nan")], "sampling_rate": 8000}, "array: expected at least one frame, all of them finite"),
        ({"sound": [0.0]}, "expected a file name, or bytes, .*array and sampling_rate.*got {'sound'"),
    ],
)
def test_arrays_that_are_no_clip(tmp_path, clip, reason):
    with pytest.raises(DataError, match=rf"line 1: column audio: {reason}"):
        convert(put(tmp_path / "t.jsonl", json.dumps({"audio": clip})))
