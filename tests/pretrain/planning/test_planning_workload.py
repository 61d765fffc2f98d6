"""What a sample holds: from statistics, from sidecars, from caps; and the rows that follow."""

import itertools
import json

import pytest

from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord.planning.typical import RowMaker
from trichord.planning.workload import SourceLoad, Spread, Workload, find_workload

IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}


@pytest.fixture
def config():
    return load_run_config("debug/tiny", ["batches.tokenizer=nowhere/tokenizer"])


def figures(mean, least, most):
    return {"count": 9, "sum": 9 * mean, "mean": mean, "min": least, "max": most, "p50": mean}


def stats_of(names) -> dict:
    source = {
        "images_per_sample": figures(1.5, 0, 3),
        "clips_per_sample": figures(0.5, 0, 1),
        "audio_seconds": figures(2.0, 1.0, 9.0),
        "text_tokens": figures(20, 10, 30),
    }
    return {"tokens_of": "sample", "sources": [{"name": name, **source} for name in names]}


def test_statistics_say_it_best(config, tmp_path):
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(stats_of(["scans", "pairs", "speech"])))
    workload = find_workload(config, file)
    assert [round(source.share, 2) for source in workload.sources] == [0.5, 0.25, 0.25]
    load = workload.sources[0]
    assert (load.images, load.clips, load.text_tokens.mean) == (1.5, 0.5, 20)
    assert load.clip_seconds.at(1.0) == 4, "longer clips are not read: samples.audio.max_seconds"
    assert load.text_tokens.at(0.25) == pytest.approx(15)
    assert workload.origin == ("samples as counted in stats.json",)


def test_statistics_of_other_data_are_refused(config, tmp_path):
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(stats_of(["scans", "speech"])))
    with pytest.raises(ConfigError, match="it has no source 'pairs', only scans, speech"):
        find_workload(config, file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no list of sources"),
        ('{"sources": {"scans": 1}}', "no list of sources"),
        ('{"sources": [{"name": "scans", "text_tokens": 3}, OTHERS]}', "figures of source 'scans' are missing or no"),
        (
            '{"sources": [{"name": "scans", "text_tokens": {"count": 3}}, OTHERS]}',
            "figures of source 'scans' are missing",
        ),
    ],
)
def test_a_file_that_holds_no_statistics_is_told_in_words(config, tmp_path, text, said):
    file = tmp_path / "stats.json"
    if text is not None:
        file.write_text(text.replace("OTHERS", '{"name": "pairs"}, {"name": "speech"}'))
    with pytest.raises(ConfigError, match=said) as raised:
        find_workload(config, file)
    assert "make it with this config: trichord data stats CONFIG --json FILE" in str(raised.value)
    assert "Error" not in str(raised.value), "no names of Python's exceptions"


def test_without_anything_the_caps_are_taken_and_said(config):
    workload = find_workload(config, None)
    speech = workload.sources[2]
    assert (speech.images, speech.clips, speech.clip_seconds.mean) == (0, 1, 4)
    assert "speech: caps, as no sidecars are here: 1 clip of the longest allowed" in workload.origin[2]


def test_sidecars_that_are_there_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    from trichord.shards.index import build_index

    with webdataset.ShardWriter(str(tmp_path / "a-%d.tar"), maxcount=10, verbose=0) as writer:
        for number in range(4):
            writer.write({"__key__": f"k{number}", "txt": "x" * (40 * (number + 1))})
    build_index(str(tmp_path / "a-0.tar"))
    config = load_run_config(
        "debug/tiny",
        ["batches.tokenizer=x", f'shards.sources=[{{"name": "a", "shards": "{tmp_path}/a-*.tar"}}]'],
    )
    workload = find_workload(config, None)
    load = workload.sources[0]
    assert (load.images, load.clips, load.text_tokens.mean) == (0, 0, 25)
    assert "sidecars of 4 samples of a-0.tar" in workload.origin[0]


def row_maker(config) -> RowMaker:
    return RowMaker(config.batches, config.samples, config.encoders, config.fusion, IDS)


def test_rows_hold_as_many_samples_as_they_do_on_average(config):
    """Texts of 8 to 40 tokens: rows of 256 hold 256 / (24 + 2) samples, cut to fit and yet no more of them."""
    source = SourceLoad("text", 1.0, 0, 0, Spread.constant(1), Spread(((0.0, 8.0), (1.0, 40.0)), 24.0))
    config = config.model_copy(
        update={"batches": config.batches.model_copy(update={"max_samples_per_row": 64})},
    )
    rows = list(itertools.islice(row_maker(config).rows(Workload((source,), ())), 40))
    samples = sum(len(row.group_ids) for row in rows) / len(rows)
    useful = sum(int((row.segment_ids >= 0).sum()) for row in rows) / len(rows)
    assert samples == pytest.approx(256 / 26, rel=0.03)
    assert useful > 250


def test_a_batch_of_the_plan_is_a_batch_of_the_loader(config):
    sources = [
        SourceLoad("a", 0.75, 1.0, 0.5, Spread.constant(0.5), Spread.constant(10)),
        SourceLoad("b", 0.25, 0.0, 0.0, Spread.constant(0.5), Spread.constant(30)),
    ]
    batch = row_maker(config).batch(Workload(tuple(sources), ()), 3)
    batch.check()
    assert batch.input_ids.shape[0] == 3 * 256
    assert batch.num_images > batch.num_audios > 0


def test_samples_longer_than_a_row_are_left_out_until_none_is_left(config):
    long = SourceLoad("long", 1.0, 100.0, 0.0, Spread.constant(1), Spread.constant(10))
    with pytest.raises(ConfigError, match=r"no sample of this run fits into a row.*row_tokens = 256"):
        row_maker(config).batch(Workload((long,), ()), 1)
