"""Config files and overrides -> typed config, and what a mistake is answered with."""

import pytest

from trichord.config.load import find_config, load_run_config, load_suite, resolved_yaml, shipped_configs
from trichord.core.errors import ConfigError

GOOD = """\
run: {name: demo, max_steps: 10}
shards:
  sources:
    - name: photos
      shards: data/*.tar
    - name: clips
      shards: [a.tar, b.tar]
      weight: 3
batches:
  tokenizer: data/tok
  rows_per_step: 8
encoders:
  vision: {name: vit}
  text: {}
fusion: {kind: none}
objectives:
  contrastive: {pairs: [image-text]}
engine:
  lr: 3e-4
  precision: fp32
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        return file

    return write_file


def message(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def test_defaults_then_file_then_overrides(write):
    file = write(GOOD)
    config = load_run_config(file)
    assert (config.engine.lr, config.engine.eps, config.shards.sources[0].shards) == (3e-4, 1e-8, ("data/*.tar",))
    config = load_run_config(file, ["engine.lr=1e-5", "engine.betas=[0.8, 0.9]", "tracking.wandb.mode=off"])
    assert (config.engine.lr, config.engine.betas, config.tracking.wandb.mode) == (1e-5, (0.8, 0.9), "off")


def test_later_overrides_win_and_null_takes_a_part_away(write):
    config = load_run_config(write(GOOD), ["engine.lr=1", "engine.lr=2", "encoders.audio={}", "encoders.audio=null"])
    assert (config.engine.lr, config.encoders.audio) == (2.0, None)


def test_overrides_reach_list_elements_by_number_and_by_name(write):
    config = load_run_config(write(GOOD), ["shards.sources.0.weight=5", "shards.sources.clips.epochs=2"])
    assert (config.shards.sources[0].weight, config.shards.sources[1].epochs) == (5.0, 2)


OVERLAY = """\
# what changes
shards:
  sources:
    clips: {weight: 5}
    photos: {epochs: 2}
engine: {lr: 1e-3, betas: [0.5, 0.6]}
encoders: {text: null, audio: {}}
"""


def test_overlay_files_merge_mappings_and_lists_by_name(write, tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text(OVERLAY.replace("text: null", "text: {hidden_size: 32}"))
    config = load_run_config(write(GOOD), ["engine.lr=1", str(overlay), "engine.betas=[0.7, 0.8]"])
    assert [(s.name, s.weight, s.epochs) for s in config.shards.sources] == [("photos", 1.0, 2), ("clips", 5.0, None)]
    assert (config.engine.lr, config.engine.betas, config.engine.precision) == (1e-3, (0.7, 0.8), "fp32")
    assert (config.encoders.text.hidden_size, config.encoders.audio is not None) == (32, True)


def test_names_that_are_numbers_are_names(write, tmp_path):
    """Classes 0 to 11 as sources, in the order 0, 1, 10, 11, 2."""
    config = write(GOOD.replace("photos", "'1'").replace("clips", "'0'"))
    overlay = tmp_path / "more.yaml"
    overlay.write_text("shards: {sources: {'0': {weight: 5}, '1': {weight: 3}}}\n")
    for more in ([str(overlay)], ["shards.sources.0.weight=5", "shards.sources.1.weight=3"]):
        sources = load_run_config(config, more).shards.sources
        assert {source.name: source.weight for source in sources} == {"0": 5.0, "1": 3.0}
    said = "shards.sources has no element '0'; expected one of photos, clips"
    assert said in message(load_run_config, write(GOOD), [str(overlay)]), "another config's sources, not the first"


def test_mistakes_in_overlays_name_their_file_and_line(write, tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text(OVERLAY.replace("clips", "clip").replace("lr: 1e-3", "lr: fast"))
    got = message(load_run_config, write(GOOD), [str(overlay)])
    assert f"{overlay}:4: shards.sources has no element 'clip'; expected one of photos, clips" in got
    assert f"{overlay}:6: engine.lr: expected a valid number" in got
    overlay.write_text("a: 1\na: 2\n")
    assert f"{overlay}:2: a: key given twice" in message(load_run_config, write(GOOD), [str(overlay)])


def test_overrides_make_the_mappings_on_their_way(write):
    config = load_run_config(write(GOOD), ["encoders.audio.mel.n_mels=40", "engine.deepspeed.zero.bucket=7"])
    assert config.encoders.audio.mel.n_mels == 40
    assert config.engine.deepspeed == {"zero": {"bucket": 7}}


def test_resolved_config_loads_back_equal(write, tmp_path):
    config = load_run_config(write(GOOD), ["engine.eps=1e-12", 'run.init_from="3e-4"'])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(config))
    assert load_run_config(resolved) == config


def test_every_mistake_of_a_file_is_reported_at_once_with_its_line(write):
    text = GOOD.replace("lr: 3e-4", "lrr: 3e-4").replace("rows_per_step: 8", "rows_per_step: many").replace(
        "weight: 3", "weight: -1"
    )  # fmt: skip
    file = write(text)
    got = message(load_run_config, file, ["engine.zero_stage=7"])
    assert got.startswith(f"4 problems in {file}:")
    assert f"{file}:19: engine.lrr: unknown key; nearest valid key: engine.lr " in got
    assert f"{file}:11: batches.rows_per_step: expected a valid integer" in got
    assert "got 'many'" in got
    assert f"{file}:8: shards.sources.1.weight: expected greater than 0, got -1" in got
    assert "override 'engine.zero_stage=7': engine.zero_stage: expected 0, 1, 2 or 3, got 7" in got


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  lr: 3e-4\n", "  lr: 3e-4\n  lr: 1\n", ":20: engine.lr: key given twice, first in line 19"),
        ("engine:\n", "lr: 1\nengine:\n", ":18: lr: unknown key; did you mean engine.lr or engine.muon.lr?"),
        ("lr: 3e-4", "lr: fast", ":19: engine.lr: expected a valid number"),
        ("lr: 3e-4", "lr: true", ":19: engine.lr: expected a number, got true or false"),
        ("lr: 3e-4", "lr: .nan", ":19: engine.lr: expected a finite number"),
        ("max_steps: 10", "max_steps: 1.5", ":1: run.max_steps: expected a valid integer"),
        ("name: demo", "name: 12", ":1: run.name: expected a valid string, got 12; quote it"),
        ("name: demo", "name: a/b", ":1: run.name: expected text matching"),
        ("{kind: none}", "none", ":15: fusion: expected a mapping of keys to values, got 'none'"),
        ("[a.tar, b.tar]", "{x: 1}", ":7: shards.sources.1.shards: expected a list, got {'x': 1}"),
        ("[a.tar, b.tar]", "[]", ":7: shards.sources.1.shards: expected at least 1 element(s), got 0"),
        ("[a.tar, b.tar]", "'pipe:cat x'", ":7: shards.sources.1.shards: 'pipe:cat x': 'pipe:' runs a shell"),
        ("precision: fp32", "precision: fp64", ":20: engine.precision: expected 'fp32', 'bf16', 'fp16' or"),
        ("  tokenizer: data/tok\n", "", ":9: batches.tokenizer: required key is missing; expected text"),
        ("fusion: {kind: none}\n", "", ": fusion: required key is missing; expected a mapping with kind, trunk"),
        ("name: clips", "name: photos", ":2: shards: source names must differ"),
        ("  text: {}\n", "", "pair 'image-text' needs a tower: set encoders.text"),
        ("name: vit", "nane: vit", ":13: encoders.vision.nane: unknown key; nearest valid key: encoders.vision.name"),
    ],
)
def test_each_kind_of_mistake_names_place_key_and_expectation(write, old, new, expected):
    assert old in GOOD
    file = write(GOOD.replace(old, new, 1))
    got = message(load_run_config, file)
    assert got.startswith(str(file))
    assert expected in got
    assert len(got.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.lr", "expected KEY.PATH=VALUE"),
        ("=3", "expected KEY.PATH=VALUE"),
        ("engine..lr=3", "expected KEY.PATH=VALUE"),
        ("engine.lr=[1", "value:1: not valid YAML"),
        ("engine.lr.x=1", "engine.lr is 0.0003, which has no keys inside"),
        ("shards.sources.movies.weight=1", "shards.sources has no element 'movies'; expected one of photos, clips"),
        ("engine.learning_rate=1", "engine.learning_rate: unknown key"),
        ("engien.lr=1", "engien: unknown key; nearest valid key: engine"),
    ],
)
def test_mistakes_in_overrides_name_the_override(write, override, expected):
    got = message(load_run_config, write(GOOD), [override])
    assert f"override {override!r}: {expected}" in got


def test_files_that_cannot_be_configs(tmp_path, write):
    assert "no such file" in message(load_run_config, tmp_path / "none.yaml")
    assert "got a folder" in message(load_run_config, tmp_path)
    assert "file is empty" in message(load_run_config, write("# nothing\n"))
    assert "expected keys and values at the top level, got list" in message(load_run_config, write("- a\n"))
    (tmp_path / "latin.yaml").write_bytes("name: Zoë".encode("latin-1"))
    assert "expected UTF-8" in message(load_run_config, tmp_path / "latin.yaml")


def test_a_run_folder_given_for_its_config_is_pointed_at_it(tmp_path):
    (tmp_path / "config.yaml").write_text(GOOD)
    assert f"did you mean {tmp_path / 'config.yaml'}?" in message(load_run_config, tmp_path)


def test_shipped_configs_go_by_their_name():
    names = ("runs/quickstart.yaml", "configs/runs/quickstart.yaml", "runs/quickstart")
    assert len({find_config(name).resolve() for name in names}) == 1
    assert find_config("tiny") == find_config("debug/tiny.yaml")
    assert "say which: runs/quickstart.yaml, suites/quickstart.yaml" in message(find_config, "quickstart")
    assert "nearest shipped: runs/quickstart.yaml" in message(find_config, "runs/quikstart.yaml")
    assert "debug/tiny.yaml" in shipped_configs()


def test_a_file_of_the_user_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug" / "tiny.yaml").write_text(GOOD)
    assert load_run_config("debug/tiny.yaml").run.name == "demo"


def test_suites_load_and_name_their_mistakes(tmp_path):
    assert load_suite("suites/quickstart.yaml").tasks
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nsources: [{name: a, shards: a.tar}]\ntasks:\n  - {kind: retreival, source: a}\n")
    assert f"{file}:4: tasks.0.kind: expected 'loss', 'retrieval' or 'caption'" in message(load_suite, file)
