"""Names in folders: dots, formats that no field takes, what is left out; and addresses, where a path is expected."""

from pathlib import Path

import pytest
from building_world import chat_of, chats, members, picture, put

from trichord.building.build import Layout, build, build_shards
from trichord.building.folder import rows_from_classes, rows_from_folder
from trichord.building.kinds import ConvertOptions, guess_kind, source_rows
from trichord.cli import main
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig


def test_dots_in_names_become_underscores_of_the_key(tmp_path, caplog):
    put(tmp_path / "in/a.b/my.photo.1.jpg", picture())
    put(tmp_path / "in/a.b/my.photo.1.txt", "words")
    put(tmp_path / "in/._1.jpg", b"of a Mac")
    samples = members(build_shards(rows_from_folder(tmp_path / "in", FieldsConfig()), tmp_path / "out"))
    assert samples == {"a.b/my_photo_1": {"jpg": picture(), "txt": b"words"}}
    assert "keys hold none: a.b/my.photo.1 -> a.b/my_photo_1" in caplog.text
    put(tmp_path / "in/a.b/my_photo_1.json", "{}")
    with pytest.raises(DataError, match=r"my\.photo\.1 and a\.b/my_photo_1 in .* both make the key 'a\.b/my_photo_1'"):
        list(rows_from_folder(tmp_path / "in", FieldsConfig()))


def test_an_unpacked_chat_keeps_its_members(tmp_path):
    for number in range(3):
        put(tmp_path / f"photos/{number}.jpg", picture(number))
    one = put(tmp_path / "photos/one.json", chats()[:1])
    before = members(build_shards(source_rows(one, "llava", ConvertOptions(), FieldsConfig()), tmp_path / "chats"))
    for key, sample in before.items():
        for ext, data in sample.items():
            put(tmp_path / f"unpacked/{key}.{ext}", data)
    after = members(build_shards(rows_from_folder(tmp_path / "unpacked", FieldsConfig()), tmp_path / "again"))
    assert after == before
    assert chat_of(after["000000000"])[0] == ("user", ["0.jpg", "What is it?"])


def test_a_sample_whose_image_is_in_no_mapped_format_is_bad(tmp_path, caplog):
    folder = tmp_path / "in"
    put(folder / "1.jpg", picture())
    put(folder / "1.gif", b"GIF89a")  # beside a picture: not needed
    put(folder / "5.gif", b"GIF89a")
    put(folder / "5.txt", "would be a text alone")
    put(folder / "notes.doc", "?")
    with pytest.raises(DataError, match=r"5\.gif: an image in none of the mapped formats \(jpg, .*: \.gif; convert it"):
        build(rows_from_folder(folder, FieldsConfig()), tmp_path / "out", Layout())
    assert "2 files in" in caplog.text
    assert "left out: 1.gif, notes.doc" in caplog.text
    result = build(rows_from_folder(folder, FieldsConfig()), tmp_path / "out", Layout(), on_bad="skip")
    assert (list(members(result.paths)), [Path(origin).name for origin, _ in result.left_out]) == (["1"], ["5.gif"])


def test_class_folders_with_another_format_and_a_broken_image(tmp_path):
    put(tmp_path / "in/heron/1.jpg", picture())
    put(tmp_path / "in/otter/2.gif", b"GIF89a")
    put(tmp_path / "in/otter/3.jpg", b"broken")
    result = build(rows_from_classes(tmp_path / "in", FieldsConfig()), tmp_path / "out", Layout(), on_bad="skip")
    assert list(members(result.paths)) == ["000000000"]
    reasons = {Path(origin).name: reason for origin, reason in result.left_out}
    assert reasons["2.gif"].startswith("an image in none of the mapped formats")
    assert reasons["3.jpg"] == "not an image in JPEG, PNG, WEBP", "the origin names the file already"


def test_links_that_lead_to_no_file_are_named(tmp_path, caplog):
    put(tmp_path / "elsewhere/2.jpg", picture())
    put(tmp_path / "in/heron/1.jpg", picture())
    (tmp_path / "in/heron/3.jpg").symlink_to(tmp_path / "elsewhere/2.jpg")
    (tmp_path / "in/heron/gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "in/otter").symlink_to(tmp_path / "elsewhere")
    for rows_from in (rows_from_folder, rows_from_classes):
        caplog.clear()
        assert len(list(rows_from(tmp_path / "in", FieldsConfig()))) == 2
        assert "2 links in" in caplog.text
        assert (
            "lead to no file and are left out (links to folders are not followed): heron/gone.jpg, otter" in caplog.text
        )


def test_addresses_are_no_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "t.csv", "text\na\n")
    put(tmp_path / "t.txt", "a b")
    for words in (
        "data build t.csv --out s3://b/x",
        "data split t.tar --by a --out s3://b/x",
        "data tokenizer t.txt --out s3://b/x",
    ):
        assert main(words.split()) == 2
        assert "--out s3://b/x is an address; expected a path of this machine" in capsys.readouterr().err
    for words, said in (
        ("data build s3://b/x.csv --out o", "SOURCE s3://b/x.csv is an address"),
        ("data build ftp://b/x.csv --out o", "of this machine: download it first, with the files that it names, with"),
        (
            "data tokenizer t.txt --out o --vocab-size 99999999999",
            "'--vocab-size': Input should be less than or equal to 4194304",
        ),
        ("data build t.csv --media hf://b/x --out o", "--media hf://b/x is an address"),
        ("data build file:///t.csv --out o", "leave out file://"),
    ):
        assert main(words.split()) == 2
        assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"t.csv", "t.txt", "cache"}, "nothing is written"
    with pytest.raises(ConfigError, match="build into a folder and copy it: aws s3 sync FOLDER gs://b"):
        build_shards([], "gs://b")
    with pytest.raises(ConfigError, match="is an address"):
        guess_kind(Path("s3://b/x.csv"))
