"""The data benchmark compares like with like, and its table says what its measurements say."""

import io
import itertools
import json
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import soundfile
from PIL import Image

from trichord.benchmarks import data as data_module
from trichord.benchmarks.data import bench_data
from trichord.benchmarks.data_contestants import CONTESTANTS, RATE, DocumentedDecoders, _item_lengths
from trichord.benchmarks.data_corpus import make_corpus
from trichord.benchmarks.data_measure import Measurement, _run, measure
from trichord.core.errors import DataError
from trichord.samples.audio import decode_audio
from trichord.samples.config import AudioConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "made", 64)


def members(url):
    with tarfile.open(url) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_corpus_is_as_described(corpus):
    assert 60 < corpus.image_kb < 100
    assert 60 < corpus.flac_kb < 100
    assert 55 < corpus.caption_tokens < 75
    found = members(corpus.flac_shards[0])
    assert len(found) == 3 * 64
    assert Image.open(io.BytesIO(found["000000.jpg"])).size == (512, 384)
    clips = [soundfile.read(io.BytesIO(data), dtype="int16") for name, data in found.items() if name.endswith("flac")]
    waves = [
        soundfile.read(io.BytesIO(data), dtype="int16") for data in list(members(corpus.wav_shards[0]).values())[1::3]
    ]
    assert all((len(clip), rate) == (5 * RATE, RATE) for clip, rate in clips)
    assert all((clip == wave).all() for (clip, _), (wave, _) in zip(clips, waves))


def test_an_earlier_corpus_is_used_and_another_one_refused(corpus, tmp_path):
    assert make_corpus(tmp_path / "made", 64) != corpus  # elsewhere, but with the same contents
    assert members(make_corpus(tmp_path / "made", 64).flac_shards[0]) == members(corpus.flac_shards[0])
    with pytest.raises(DataError, match="another corpus"):
        make_corpus(tmp_path / "made", 128)


@pytest.mark.slow  # imports transformers and torchvision
def test_both_sides_compute_the_same_log_mel(corpus):
    flac = members(corpus.flac_shards[0])["000000.flac"]
    theirs = DocumentedDecoders(corpus).audio(flac).numpy()
    ours = _item_lengths("worker").log_mel(decode_audio(flac, AudioConfig()))
    np.testing.assert_allclose(theirs.T, ours, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param("bare docs", marks=pytest.mark.slow), "bare trichord", "trichord", "trichord, mel on device, wav"],
)
def test_each_pipeline_gives_batches_for_ever(corpus, name):
    batches = list(itertools.islice(CONTESTANTS[name](corpus, 0), 5))  # two batches are an epoch
    assert len(batches) == 5
    if name.startswith("trichord"):
        batch = batches[-1].micro_batches[0]
        assert (batch.num_images, batch.num_audios, batch.num_segments) == (32, 32, 32)
        assert bool(batch.log_mels.shape[0]) == (name == "trichord")


def test_table_and_targets_follow_from_the_measurements(corpus, monkeypatch):
    cost = {
        "bare docs": 4000, "bare trichord": 2000, "webdataset": 5000, "trichord": 2500, "trichord, mel on device": 2000,
        "trichord, mel on device, wav": 1000, "webdataset, raw": 600, "trichord, raw": 300,
    }  # fmt: skip
    asked = []

    def fake(request):
        asked.append((request.name, request.workers))
        cpu = float(cost[request.name])
        return Measurement(cpu / max(1, request.workers), cpu, 0.5, [100.0, 104.0] if request.epochs else [])

    monkeypatch.setattr(data_module, "measure", fake)
    monkeypatch.setattr(data_module, "make_corpus", lambda *args: corpus)
    result = bench_data("unused", workers=(1, 2), rounds=2)
    json.dumps(result)
    assert asked[:14] == asked[14:28][::-1]  # rounds alternate
    rows = {(row["pipeline"], row["workers"]): row for row in result["rows"]}
    assert rows["trichord", 2]["x wall"] == rows["trichord", 1]["x wall"] == 2.0
    assert rows["trichord", 1]["loader us"] == 500
    assert rows["webdataset", 1]["loader us"] == 1000
    assert result["memory"][1] == {"pipeline": "trichord", "peak PSS MiB": 104, "growth MiB": 4, "epochs": [100, 104]}
    verdicts = {target["what"]: target["met"] for target in result["targets"]}
    assert verdicts["same work, x wall, 1 worker"]
    assert verdicts["as shipped, 16-bit WAV, x wall, 2 workers"]
    assert not verdicts["share of the bare loop's speed, CPU, 1 worker"]
    assert not verdicts["loader's own cost over webdataset's, CPU, 2 workers"]


def measure_warm(request):
    """As `measure` does, but in a fork of this process, which has imported everything: a start costs no seconds."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(_run, request).result()


@pytest.mark.slow
def test_the_verb_measures(tmp_path, monkeypatch, capsys):
    from trichord.cli import main

    really = "trichord, raw"  # in a fresh interpreter, as all of them are for a user
    instead = lambda request: (measure if request.name == really else measure_warm)(request)
    monkeypatch.setattr(data_module, "measure", instead)
    file = tmp_path / "bench.json"
    command = f"bench data --workers 1 --rounds 1 --batches 2 --samples 64 --folder {tmp_path / 'made'} --json {file}"
    assert main(command.split()) == 0
    assert "loader's own cost" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8
    assert all(100 < row["CPU us"] < 1e6 and 0 < row["wall us"] < 1e7 for row in rows)
