"""Splitting shards: by class, and into training and held-out sets that share no image."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from building_world import digests, members, picture, put

from trichord.building.build import BuildRow, Layout, build_shards
from trichord.building.split import by_fractions, by_value, split_shards
from trichord.cli import main
from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import ShardsConfig

IMAGES, CAPTIONS = 60, 5


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """60 images with 5 captions each, of three licences, with members that no field is mapped to."""
    rows = []
    for caption in range(CAPTIONS):
        for image in range(IMAGES):
            facts = {"image_id": image, "licence": {"id": ("cc0", "by/sa", 3)[image % 3]}}
            extra = {"json": json.dumps(facts).encode(), "seg.npy": b"\0\1", "txt": f"{caption}".encode()}
            rows.append(BuildRow(f"c{caption}/{image:03d}", {"jpg": picture(image), **extra}))
    return build_shards(rows, tmp_path / "all", samples_per_shard=70)


def divide(shards: list[str], out: Path, group_of, **options):
    return split_shards(shards, out, group_of, Layout(samples_per_shard=40), of={}, **options)


def test_a_folder_per_value_with_an_overlay(shards, tmp_path, capsys):
    pattern = f"{tmp_path}/all/*.tar"
    assert main(["data", "split", pattern, "--by", "licence.id", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[-1] == f"{tmp_path}/out/sources.yaml"
    all_samples = members(shards)
    groups = {
        folder.name: members(sorted(folder.glob("*.tar"))) for folder in (tmp_path / "out").iterdir() if folder.is_dir()
    }
    assert {name: len(group) for name, group in groups.items()} == {"cc0": 100, "by_sa": 100, "3": 100}
    assert {key: sample for group in groups.values() for key, sample in group.items()} == all_samples
    assert list(groups["cc0"]) == [key for key in all_samples if key in groups["cc0"]], "the order stays"
    assert all(json.loads(sample["json"])["licence"]["id"] == "by/sa" for sample in groups["by_sa"].values())
    overlay = yaml.safe_load((tmp_path / "out/sources.yaml").read_text())
    assert [source.name for source in ShardsConfig(**overlay["shards"]).sources] == ["3", "by_sa", "cc0"]
    config = load_run_config("runs/quickstart.yaml", [str(tmp_path / "out/sources.yaml")])
    assert config.shards.sources[2].shards == (f"{tmp_path}/out/cc0/shard-*.tar",)


def test_fractions_keep_the_samples_of_an_image_together(shards, tmp_path):
    result = divide(shards, tmp_path / "out", by_fractions({"train": 0.8, "val": 0.2}, "image_id"))
    sides = {name: members(paths) for name, paths in result.shards.items()}
    images = {
        name: {json.loads(sample["json"])["image_id"] for sample in side.values()} for name, side in sides.items()
    }
    assert not images["train"] & images["val"]
    assert len(images["train"] | images["val"]) == IMAGES
    assert 5 <= len(images["val"]) <= 20
    assert Counter(key for side in sides.values() for key in side) == Counter(members(shards).keys())


def test_without_a_group_samples_of_one_image_fall_apart(shards, tmp_path):
    result = divide(shards, tmp_path / "out", by_fractions({"train": 0.8, "val": 0.2}))
    images = [{json.loads(s["json"])["image_id"] for s in members(paths).values()} for paths in result.shards.values()]
    assert images[0] & images[1]


def test_a_split_is_the_same_again_and_by_more_workers(shards, tmp_path):
    group_of = by_fractions({"train": 0.8, "val": 0.2}, "image_id")
    divide(shards, tmp_path / "one", group_of)
    divide(shards, tmp_path / "two", group_of, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert {name.split("/")[0] for name in digests(tmp_path / "one")} == {"train", "val"}


def test_samples_without_the_key_stop_the_split_or_are_left_out(shards, tmp_path):
    rows = [BuildRow("odd", {"txt": b"x"}), BuildRow("list", {"json": b'{"licence": {"id": [1]}}'})]
    odd = build_shards(rows, tmp_path / "odd")
    with pytest.raises(DataError, match=r"sample 'odd': no json key licence\.id: its json holds no keys"):
        divide([*shards, *odd], tmp_path / "out", by_value("licence.id"))
    for group_of in (by_value("licence.name"), by_fractions({"a": 0.5, "b": 0.5}, "licence.name")):
        with pytest.raises(DataError, match=r"no json key licence\.name; the keys in licence of its json are id$"):
            divide(shards, tmp_path / "out", group_of)
    result = divide([*shards, *odd], tmp_path / "out", by_value("licence.id"), on_bad="skip")
    assert (result.samples, len(result.left_out)) == (300, 2)


def test_damaged_shards_end_the_split(shards, tmp_path):
    cut = put(tmp_path / "cut.tar", Path(shards[0]).read_bytes()[:50_000])
    with pytest.raises(DataError, match=r"cut\.tar is damaged: .*copy it again, or leave it out"):
        divide([str(cut)], tmp_path / "out", by_value("image_id"))


def test_pickled_members_are_not_copied(tmp_path, caplog):
    import io
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("a.json", b'{"c": 1}'), ("a.pkl", b"cos\nsystem\n.")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    result = divide([str(tmp_path / "s.tar")], tmp_path / "out", by_value("c"))
    assert members(result.paths) == {"a": {"json": b'{"c": 1}'}}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.9}, r"add up to 1, such as train=0\.98,val=0\.02; got \{'train': 0\.9\}"),
        ({"train": 0.9, "val": 0.2}, "add up to 1"),
        ({"train": 1.0, "val": 0.0}, "add up to 1"),
        ({"a/b": 0.5, "c": 0.5}, "'a/b' names a folder"),
    ],
)
def test_fractions_that_are_none(fractions, message):
    with pytest.raises(ConfigError, match=message):
        by_fractions(fractions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--by a --fractions train=1", "either --by KEY or --fractions"),
        ("--by a --group b", "--group is for --fractions"),
        ("--fractions train=x,val=1", "expected train=0.98,val=0.02"),
        ("--fractions train", "expected each name once, with a value"),
    ],
)
def test_wrong_words_on_the_command_line(shards, tmp_path, arguments, words, capsys):
    assert main(["data", "split", *shards, "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    assert words in capsys.readouterr().err
