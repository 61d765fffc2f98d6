"""The quick-start's data: real, split without overlap, the same bytes each time, readable by the room that reads."""

import hashlib
import io
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from trichord.batches.tokenizer import load_tokenizer
from trichord.core.errors import ConfigError
from trichord.quickstart.dataset import (
    DIGIT_WORDS,
    RECORDING_NAMES,
    build_quickstart_data,
    read_recordings,
    read_scans,
    split_scans,
    word_of,
)
from trichord.shards.config import ShardsConfig
from trichord.shards.reader import open_sources, read_member

SOURCES = ("scans-train", "pairs-train", "speech-train", "scans-heldout", "gallery", "speech-known")
FIELDS = {
    "scans-train": {"image", "text", "meta"},
    "pairs-train": {"image", "audio", "text", "meta"},
    "speech-train": {"audio", "text", "meta"},
    "scans-heldout": {"image", "text", "meta"},
    "gallery": {"audio", "text", "meta"},
    "speech-known": {"audio", "text", "meta"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    return folder, build_quickstart_data(folder, seed=0)


@pytest.fixture(scope="module")
def samples(data) -> dict[str, list[dict[str, bytes]]]:
    folder, _ = data
    config = ShardsConfig(sources=[{"name": name, "shards": f"{folder}/{name}-*.tar"} for name in SOURCES])  # type: ignore
    read = {}
    for table in open_sources(config):
        entries = [table.entry(number) for number in range(table.num_samples)]
        assert [entry.problem for entry in entries] == [None] * len(entries)
        read[table.name] = [{name: read_member(e, name, 10**6) for name in e.members} for e in entries]
    return read


def test_sources_have_their_fields_and_sizes(data, samples):
    assert {name: {frozenset(sample) for sample in samples[name]} for name in SOURCES} == {
        name: {frozenset(fields)} for name, fields in FIELDS.items()
    }
    sizes = {name: len(samples[name]) for name in SOURCES}
    assert sizes == {name: source["samples"] for name, source in data[1]["sources"].items()}
    assert sizes["scans-train"] + sizes["pairs-train"] + sizes["scans-heldout"] == 1797
    assert (sizes["gallery"], sizes["speech-known"], sizes["speech-train"]) == (10, 36, 360)
    assert abs(sizes["scans-heldout"] - 0.2 * 1797) < 5
    assert abs(sizes["scans-train"] - 0.6 * 0.8 * 1797) < 5


def test_no_held_out_picture_was_trained_on(samples):
    def pictures(*names):
        return {np.asarray(Image.open(io.BytesIO(s["image"]))).tobytes() for name in names for s in samples[name]}

    train, held_out = pictures("scans-train", "pairs-train"), pictures("scans-heldout")
    assert len(train) + len(held_out) == 1797
    assert not train & held_out


def test_held_out_scans_are_stratified(samples):
    held_out = Counter(sample["text"].decode() for sample in samples["scans-heldout"])
    train = Counter(sample["text"].decode() for sample in samples["scans-train"] + samples["pairs-train"])
    assert set(held_out) == set(train) == set(DIGIT_WORDS)
    for word, count in held_out.items():
        assert abs(count / (count + train[word]) - 0.2) < 0.01


def test_pictures_are_the_scans_without_loss(samples):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for sample in samples["scans-heldout"][:50] + samples["pairs-train"][:50]:
        meta = json.loads(sample["meta"])
        picture = Image.open(io.BytesIO(sample["image"]))
        assert (picture.size, picture.mode) == ((32, 32), "L")
        small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX))
        assert np.array_equal(np.round(small / 255 * 16), digits.images[meta["scan"]])
        assert sample["text"].decode() == DIGIT_WORDS[digits.target[meta["scan"]]]


def test_recordings_are_those_of_the_package(samples):
    recordings = read_recordings()
    assert "".join(recordings) == RECORDING_NAMES
    for sample in samples["speech-known"] + samples["pairs-train"][:20] + samples["speech-train"][:20]:
        name = json.loads(sample["meta"])["recording"]
        audio, rate = soundfile.read(io.BytesIO(sample["audio"]), dtype="int16")
        assert (rate, audio.ndim) == (16_000, 1)
        assert np.array_equal(audio, recordings[name])
        assert sample["text"].decode() == word_of(name)
    for name in ("0", "M"):
        file = files("captcha") / "data" / name / "default.wav"
        original, rate = soundfile.read(io.BytesIO(file.read_bytes()))
        assert (rate, len(recordings[name])) == (8000, 2 * len(original))
        # at twice the rate, every other sample is the original one, up to the filter's ripple
        assert np.abs(recordings[name][::2] / 32768 - original).max() < 0.05 * np.abs(original).max()
        assert abs(np.std(recordings[name][::2] / 32768) / np.std(original) - 1) < 0.02
    lengths = [len(samples) / 16_000 for samples in recordings.values()]
    assert min(lengths) > 0.2
    assert max(lengths) < 4


def test_the_gallery_has_each_class_once_and_speech_is_repeated_evenly(samples):
    assert sorted(sample["text"].decode() for sample in samples["gallery"]) == sorted(DIGIT_WORDS)
    assert set(Counter(sample["text"] for sample in samples["speech-train"]).values()) == {10}


def test_the_tokenizer_knows_every_word(data):
    folder, splits = data
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assert (folder / "texts.txt").read_text().split("\n")[:-1] == splits["texts"]
    for text in splits["texts"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len({tuple(tokenizer.encode(text)) for text in splits["texts"]}) == 36


def _digests(folder: Path) -> dict[str, str]:
    found = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".len"]  # .len holds an mtime
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def test_the_same_seed_gives_the_same_bytes_and_a_second_call_builds_nothing(data, tmp_path, monkeypatch):
    folder, splits = data
    again = tmp_path / "again"
    again.mkdir()
    assert build_quickstart_data(again, seed=0) == splits
    assert _digests(again) == _digests(folder)
    monkeypatch.setattr("trichord.quickstart.dataset._write", lambda *_: pytest.fail("built twice"))
    assert build_quickstart_data(again, seed=0) == splits
    assert not list(tmp_path.glob(".again*"))


def test_another_seed_splits_otherwise():
    scans = read_scans()
    first, second = (
        {name: {scan.number for scan in part} for name, part in split_scans(scans, seed).items()} for seed in (0, 1)
    )
    assert not any(first[name] == second[name] for name in first)
    assert {name: len(part) for name, part in first.items()} == {name: len(part) for name, part in second.items()}


@pytest.mark.parametrize("change", ["seed", "shard", "foreign"])
def test_a_folder_with_something_else_is_left_alone(data, tmp_path, change):
    folder = tmp_path / "data"
    folder.mkdir()
    if change == "foreign":
        (folder / "thesis.tex").write_text("precious")
    else:
        splits = {**data[1], "seed": 1 if change == "seed" else 0}
        (folder / "splits.json").write_text(json.dumps(splits))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ConfigError, match=r"not empty and does not hold .* seed 0 and these voices; remove it"):
        build_quickstart_data(folder, seed=0)
    assert sorted(path.name for path in folder.iterdir()) == before
