"""The sidecars: their exact text, what is measured, when they are built anew, where they are kept."""

import dataclasses
import json
import os
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trichord.core.errors import DataError
from trichord.shards import gathering, sidecars
from trichord.shards.config import FieldsConfig
from trichord.shards.index import MemberRef, build_index, index_shards, load_header, load_index


def test_idx_is_what_wds2idx_writes(write_tar):
    path = write_tar(
        [("a/0.txt", b"x" * 600), ("a/0.json", b"{}"), (".hidden", b"-"), ("README", b"-"), ("a/1.seg.PNG", b"png")]
    )
    build_index(path)
    # computed by hand: each member is one header block of 512 bytes and its data in whole blocks
    assert Path(path).with_suffix(".idx").read_text() == (
        "v1.2 2\ntxt 512 600 a/0.txt json 2048 2 a/0.json\nseg.PNG 5120 3 a/1.seg.PNG\n"
    )


def test_len_is_versioned_and_has_one_line_per_sample(write_tar, png, sound):
    path = write_tar(
        [
            ("0.png", png(7, 5)),
            ("0.txt", "naïve".encode()),
            ("1.wav", sound(800, 8000)),
            ("1.txt", b""),
            ("2.json", b"{}"),
        ]
    )
    build_index(path)
    lines = [json.loads(line) for line in Path(path).with_suffix(".len").read_text().splitlines()]
    header = lines[0]
    assert (header["format"], header["version"], header["samples"]) == ("trichord-len", 2, 3)
    assert header["shard"] == {"size": os.path.getsize(path), "mtime_ns": os.stat(path).st_mtime_ns}
    assert header["columns"] == [["audio", "wav"], ["image", "png"], ["text", "txt"]]
    assert lines[1:] == [[None, [7, 5], 5], [[800, 8000], None, 0], [None, None, None]]


def test_entries_of_a_webdataset_shard(tmp_path, png, sound):
    import webdataset

    path = str(tmp_path / "w.tar")
    with webdataset.ShardWriter(
        str(tmp_path / "w.tar").replace("w.tar", "w-%02d.tar"), maxcount=2, verbose=0
    ) as writer:
        for number in range(3):
            writer.write(
                {
                    "__key__": f"dir.v1/{number}",
                    "png": png(8, 6),
                    "flac": sound(321, 16000, "FLAC"),
                    "txt": "hello",
                    "json": {"n": number},
                }
            )
    path = str(tmp_path / "w-00.tar")
    index = load_index(path)
    entry = index.entry(1)
    assert index.num_samples == 2
    assert (entry.key, entry.shard, entry.problem) == ("dir.v1/1", path, None)
    assert (entry.image_size, entry.audio_frames, entry.audio_rate, entry.text_chars) == ((8, 6), 321, 16000, 5)
    assert list(entry.members) == ["image", "audio", "text", "meta"]
    for ref in entry.members.values():
        with open(path, "rb") as file, tarfile.open(path) as tar:
            file.seek(ref.offset)
            assert file.read(ref.size) == tar.extractfile(ref.name).read()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(write_tar, format):
    names = ["d" * 90 + "/" + "n" * 200 + ".txt", "Übergröße/猫.txt", "p" * 300 + ".txt"]
    path = write_tar([(name, name.encode()) for name in names], format=format)
    entries = [load_index(path).entry(number) for number in range(3)]
    assert [entry.key + ".txt" for entry in entries] == names
    data = Path(path).read_bytes()
    for name, entry in zip(names, entries):
        ref = entry.members["text"]
        assert data[ref.offset : ref.offset + ref.size] == name.encode()


def test_names_are_keys_and_never_paths(write_tar):
    path = write_tar([("../../etc/passwd.txt", b"a"), ("/abs/1.txt", b"b"), ("./2.txt", b"c")])
    index = load_index(path)
    assert [index.entry(number).key for number in range(3)] == ["../../etc/passwd", "/abs/1", "./2"]


def test_white_space_in_names_keeps_idx_readable_and_keys_exact(write_tar):
    path = write_tar([("my cat.txt", b"a"), ("my cat.a b.json", b"{}"), ("tab\tnew\nline.txt", b"b")])
    index = load_index(path)
    assert [index.entry(number).key for number in range(2)] == ["my cat", "tab\tnew\nline"]
    reloaded = load_index(path)
    assert reloaded.entry(0) == index.entry(0)
    lines = Path(path).with_suffix(".idx").read_text().splitlines()
    assert lines[1] == "txt 512 1 my%20cat.txt a%20b.json 1536 2 my%20cat.a%20b.json"
    assert len(lines) == 3


def test_members_in_any_order_and_the_first_mapped_extension_wins(write_tar, png):
    path = write_tar([("0.txt", b"t"), ("0.png", png()), ("0.jpg", png(9, 9, "JPEG")), ("0.JSON", b"{}")])
    entry = load_index(path).entry(0)
    assert entry.members["image"].name == "0.jpg"
    assert entry.image_size == (9, 9)
    assert entry.members["meta"] == MemberRef("json", "0.JSON", entry.members["meta"].offset, 2)


def test_a_mapping_that_was_not_measured_yet_builds_the_index_anew(write_tar, png):
    path = write_tar([("0.img", png(5, 2)), ("0.caption", b"four")])
    assert "no member with a mapped extension" in load_index(path).entry(0).problem
    fields = FieldsConfig(image=("img",), text=("caption",))
    entry = load_index(path, fields).entry(0, fields)
    assert (entry.image_size, entry.text_chars, entry.problem) == ((5, 2), 4, None)
    assert load_header(path).num_samples == 1


def test_pickled_members_are_ignored_and_counted(write_tar):
    path = write_tar(
        [("0.txt", b"t"), ("0.pyd", b"x"), ("0.a.PKL", b"x"), ("1.pth", b"x"), ("2.txt", b"u"), ("2.pt", b"x")]
    )
    index = load_index(path)
    assert index.unsafe_members == 4
    assert [sorted(index.entry(number).members) for number in range(3)] == [["text"], [], ["text"]]
    assert "no member with a mapped extension" in index.entry(1).problem


def test_pickled_members_cannot_be_mapped(write_tar):
    path = write_tar([("0.a.pkl", b"x"), ("0.txt", b"t")])
    fields = FieldsConfig(meta=("a.pkl",))
    assert sorted(load_index(path, fields).entry(0, fields).members) == ["text"]


def test_problems_of_samples(write_tar, png, sound):
    path = write_tar(
        [
            ("twice.txt", b"a"),
            ("twice.TXT", b"b"),
            ("latin.txt", b"\xe4\xf6"),
            ("noimage.png", b"<html>"),
            ("noaudio.flac", b"nothing"),
            ("cut.wav", sound()[:20]),
            ("empty.png", b""),
            ("fine.txt", b"ok"),
        ]
    )
    index = load_index(path)
    problems = {(entry := index.entry(n)).key: entry.problem for n in range(index.num_samples)}
    assert "two members with extension 'txt', the second is 'twice.TXT'" in problems["twice"]
    assert problems["latin"].startswith("text: text is not UTF-8: invalid continuation byte at byte 0")
    assert problems["noimage"] == "image: not an image in JPEG, PNG, WEBP"
    assert problems["noaudio"].startswith("audio: broken audio: ")
    assert problems["cut"].startswith("audio: ")
    assert problems["empty"] == "image: the member is empty"
    assert problems["fine"] is None
    assert index.entry(index.num_samples - 1, max_members=0).problem == (
        "1 members, more than shards.max_members_per_sample 0"
    )
    assert load_index(path).entry(2).problem == index.entry(2).problem


@pytest.mark.parametrize(("orientation", "expected"), [(1, (8, 6)), (3, (8, 6)), (6, (6, 8)), (8, (6, 8))])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_image_size_is_after_exif_rotation(write_tar, png, format, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ext = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[format]
    path = write_tar([(f"0.{ext}", png(8, 6, format, exif=exif))])
    assert load_index(path).entry(0).image_size == expected


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_frames_are_those_the_decoder_gives(write_tar, sound, format):
    import io

    import soundfile

    data = sound(12_345, 16_000, format, channels=2)
    path = write_tar([(f"0.{format.lower()}", data)])
    entry = load_index(path).entry(0)
    decoded, rate = soundfile.read(io.BytesIO(data))
    assert (entry.audio_frames, entry.audio_rate) == (len(decoded), rate)


def test_frames_of_a_cut_mp3_are_counted_not_believed(write_tar, sound):
    data = sound(40_000, 16_000, "MP3")
    path = write_tar([("0.mp3", data[: len(data) // 2])])
    # the header still says 40,000
    assert 5_000 < load_index(path).entry(0).audio_frames < 30_000


def test_a_stale_index_is_built_anew(write_tar, monkeypatch):
    path = write_tar([("0.txt", b"one")])
    assert load_index(path).entry(0).text_chars == 3
    monkeypatch.setattr(gathering, "measure", lambda *_: pytest.fail("a fresh index must not be built again"))
    assert load_index(path).entry(0).text_chars == 3
    monkeypatch.undo()
    before = os.stat(path)
    write_tar([("0.txt", b"longer")])  # the same length of the tar: only the time tells
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert os.path.getsize(path) == before.st_size
    assert load_index(path).entry(0).text_chars == 6
    write_tar([("0.txt", b"x" * 20_000)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the same time: only the length tells
    assert load_index(path).entry(0).text_chars == 20_000


@pytest.mark.parametrize("ending", [".idx", ".len"])
@pytest.mark.parametrize("damage", ["remove", "cut", "other version"])
def test_damaged_sidecars_are_built_anew(write_tar, ending, damage):
    path = write_tar([("0.txt", b"one"), ("1.txt", b"three")])
    build_index(path)
    sidecar = Path(path).with_suffix(ending)
    good = sidecar.read_bytes()
    if damage == "remove":
        sidecar.unlink()
    elif damage == "cut":
        sidecar.write_bytes(good[:-3])
    else:
        sidecar.write_bytes(good.replace(b"v1.2", b"v1.1").replace(b'"version":1', b'"version":99'))
    assert load_index(path).entry(1).text_chars == 5
    assert sidecar.read_bytes() == good


def test_a_folder_that_cannot_be_written_uses_the_cache(write_tar, own_cache, monkeypatch):
    path = write_tar([("0.txt", b"one")])
    replace_file = sidecars._replace_file

    def refuse_beside(target, data):
        if not target.startswith(str(own_cache)):
            raise PermissionError(13, "Permission denied", target)
        replace_file(target, data)

    monkeypatch.setattr(sidecars, "_replace_file", refuse_beside)
    assert load_index(path).entry(0).text_chars == 3
    assert not Path(path).with_suffix(".len").exists()
    assert len(list(own_cache.rglob("*.len"))) == 1
    monkeypatch.setattr(gathering, "measure", lambda *_: pytest.fail("the cached index must be used"))
    assert load_index(path).entry(0).text_chars == 3


def test_nowhere_to_write_says_what_to_do(write_tar, monkeypatch):
    path = write_tar([("0.txt", b"one")])

    def refuse(target, data):
        raise OSError(30, "Read-only file system", target)

    monkeypatch.setattr(sidecars, "_replace_file", refuse)
    with pytest.raises(DataError, match=r"cannot write the sidecars .*s\.len.*TRICHORD_CACHE"):
        load_index(path)


def test_two_writers_at_once_leave_a_whole_sidecar(write_tar):
    path = write_tar([("0.txt", b"one")])
    first, second = build_index(path), build_index(path)
    assert first.header == second.header
    assert not list(Path(path).parent.glob(".sidecar-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_many_shards(text_shards, workers):
    paths = text_shards([3, 0, 2])
    load_index(paths[0])
    calls = []
    headers = index_shards(paths, workers=workers, on_progress=lambda *call: calls.append(call))
    assert [(header.url, header.num_samples) for header in headers] == list(zip(paths, [3, 0, 2]))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(call[2] for call in calls) == paths


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_that_cannot_be_indexed_are_told_of_and_do_not_keep_the_others(text_shards, workers):
    paths = text_shards([3, 1, 2])
    Path(paths[1]).write_bytes(b"<html>" * 200)
    lost = paths[0].replace("000", "009")
    named, failures, calls = [lost, *paths], {}, []
    headers = index_shards(named, workers, lambda *call: calls.append(call), None, failures.__setitem__)
    assert [(header.url, header.num_samples) for header in headers] == [(paths[0], 3), (paths[2], 2)]
    assert sorted(failures) == sorted([lost, paths[1]])
    assert "is no tar file" in str(failures[paths[1]])
    assert "check that the shard is there" in str(failures[lost])
    assert calls[-1][:2] == (4, 4)
    with pytest.raises(DataError, match=r"t-009\.tar"):
        index_shards(named, workers)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar.*check that the shard is there"):
        load_index(str(tmp_path / "gone.tar"))


def test_an_entry_is_read_in_microseconds(text_shards):
    index = load_index(text_shards([500])[0])
    start = time.perf_counter()
    for number in range(500):
        index.entry(number)
    assert (time.perf_counter() - start) / 500 < 2e-3  # 10-20 us on a quiet core; the bound only catches rescans


def test_members_of_numpy_and_torch_free_import():
    """A login node indexes shards: importing the room's reading side needs neither numpy nor torch."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "import trichord.shards.index, trichord.shards.reader, trichord.shards.lanes\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'soundfile', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert np.__name__ == "numpy"


@pytest.mark.parametrize("change", ["measure", "garbage"])
def test_a_len_whose_body_was_changed_is_built_anew(write_tar, change):
    path = write_tar([("0.txt", b"one"), ("1.txt", b"three")])
    build_index(path)
    sidecar = Path(path).with_suffix(".len")
    good = sidecar.read_bytes()
    header, *lines = good.splitlines(keepends=True)
    changed = [b"\xff" * (len(line) - 1) + b"\n" if change == "garbage" else b"[9]\n" for line in lines]
    sidecar.write_bytes(header + b"".join(changed))
    assert load_index(path).entry(1).text_chars == 5
    assert sidecar.read_bytes() == good


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"null",
        b"[[[3]",
        b"[[]]",
        b'[5,{"names":7}]',
        b'[5,{"numbered":[1]}]',
        b"[]",
        b"[-1]",
        b"[true]",
        b"[2.5]",
    ],
)
def test_a_len_that_lies_about_its_digest_names_the_remedy(write_tar, line):
    path = write_tar([("0.txt", b"one"), ("0.0.jpg", b"-")])
    header = dataclasses.replace(build_index(path).header, body=sidecars.digest(line + b"\n"))
    Path(path).with_suffix(".len").write_bytes(header.to_line().encode() + line + b"\n")
    with pytest.raises(DataError, match=r"is damaged at sample 0 .*remove its \.idx and \.len"):
        load_index(path).entry(0)


def test_siblings_are_all_images_clips_and_texts_of_a_sample(write_tar, png, sound):
    path = write_tar(
        [
            ("c.json", b"{}"),
            ("c.0.PNG", png(7, 5)),
            ("c.1.jpg", b"<html>"),
            ("c.left.flac", sound(321, 16_000, "FLAC")),
            ("c.answer.txt", "naïve".encode()),
            ("c.png", png(2, 3)),
            ("c.1.pkl", b"-"),
            ("c.depth.npy", b"-"),
            ("d.txt", b"plain"),
        ]
    )
    build_index(path)
    entry = load_index(path).entry(0)
    assert entry.problem is None
    assert {ext: (sibling.kind, sibling.measure) for ext, sibling in entry.siblings.items()} == {
        "0.png": ("image", [7, 5]),
        "1.jpg": ("image", "not an image in JPEG, PNG, WEBP"),
        "left.flac": ("audio", [321, 16_000]),
        "answer.txt": ("text", 5),
        "png": ("image", [2, 3]),
    }
    assert entry.siblings["png"].ref == entry.members["image"]
    assert entry.siblings["0.png"].ref.name == "c.0.PNG"
    assert entry.text_chars is None, "a field takes its exact extension only"
    assert set(load_index(path).entry(1).siblings) == {"txt"}


def test_the_exact_extension_says_the_kind_before_its_last_part(write_tar, png):
    path = write_tar([("0.seg.png", b"four"), ("0.b.png", png(5, 2)), ("0.json", b"{}")])
    fields = FieldsConfig(text=("seg.png",))
    load_index(path, fields)
    assert [(s.kind, s.measure) for s in load_index(path, fields).entry(0, fields).siblings.values()] == [
        ("text", 4),
        ("image", [5, 2]),
    ]
    # the same sidecars under the default mapping
    assert load_index(path).entry(0).siblings["seg.png"].kind == "image"


def test_a_sample_of_too_many_members_has_no_siblings(write_tar):
    path = write_tar([(f"0.{number}.txt", b"x") for number in range(9)])
    assert len(load_index(path).entry(0).siblings) == 9
    entry = load_index(path).entry(0, max_members=8)
    assert (entry.siblings, entry.problem) == ({}, "9 members, more than shards.max_members_per_sample 8")


def test_a_right_idx_of_wds2idx_stays_and_a_wrong_one_is_replaced(write_tar):
    """DALI's tool writes `.idx` only; on a tar with PAX headers its offsets are wrong."""
    path = write_tar([("0.txt", b"one"), ("1.txt", b"three")], format=tarfile.USTAR_FORMAT)
    idx = Path(path).with_suffix(".idx")
    idx.write_text("v1.2 2\ntxt 512 3 0.txt\ntxt 1536 5 1.txt\n")
    before = os.stat(idx)
    assert load_index(path).entry(1).text_chars == 5
    assert (os.stat(idx).st_ino, os.stat(idx).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    Path(path).with_suffix(".len").unlink()
    idx.write_text("v1.2 2\ntxt 1024 3 0.txt\ntxt 2048 5 1.txt\n")
    assert load_index(path).entry(1).members["text"].offset == 1536
    assert idx.read_text() == "v1.2 2\ntxt 512 3 0.txt\ntxt 1536 5 1.txt\n"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("v1.2 2\ntxt 512 3 0.txt\ntxt 1536 5 1.txt\n", None),
        ("v1.1 2\ntxt 512 3\ntxt 1536 5\n", None),  # the versions before had no names
        ("v1.0 2\ntxt 512 3\ntxt 1536 5\n", None),
        (
            "v1.2 2\ntxt 512 3 0.txt\ntxt 2048 5 1.txt\n",
            r"s\.idx: it has txt of 5 bytes at byte 2048 in sample 2, the tar txt of 5 bytes at byte 1536 \(1\)",
        ),
        ("v1.1 1\ntxt 512 3\n", r"s\.idx: it lists 1 samples, and the tar holds 2"),
        ("v1.2 2\ntxt 512 3\ntxt 1536 5\n", r"s\.idx: it has a line that cannot be read in sample 1"),
        ("<html>", r"s\.idx: its first line is '<html>', expected v1\.0, v1\.1 or v1\.2"),
        ("", r"s\.idx: its first line is ''"),
    ],
)
def test_the_idx_of_another_tool_is_compared_and_never_believed(write_tar, caplog, theirs, said):
    path = write_tar([("0.txt", b"one"), ("1.txt", b"three")])
    idx = Path(path).with_suffix(".idx")
    idx.write_text(theirs)
    index = load_index(path)
    assert [index.entry(number).members["text"].offset for number in range(2)] == [512, 1536]
    assert idx.read_text() == "v1.2 2\ntxt 512 3 0.txt\ntxt 1536 5 1.txt\n"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (said is not None)
    assert said is None or (re.search(said, told[0]) and "the .idx of another tool is replaced" in told[0])


def test_our_own_idx_of_an_earlier_version_is_replaced_without_a_word(write_tar, caplog):
    path = write_tar([("0.txt", b"one")])
    load_index(path)
    write_tar([("0.txt", b"one"), ("1.txt", b"three")])
    assert load_index(path).num_samples == 2
    assert not caplog.records


def test_the_layout_of_img2dataset(write_tar, png):
    meta = json.dumps({"key": "000000001", "caption": "a cat", "status": "success"}).encode()
    path = write_tar(
        [("000000001.jpg", png(9, 7, "JPEG")), ("000000001.txt", b"a cat"), ("000000001.json", meta)], "00000.tar"
    )
    Path(path).with_name("00000_stats.json").write_text("{}")
    entry = load_index(path).entry(0)
    assert (entry.key, list(entry.members), entry.image_size) == ("000000001", ["image", "text", "meta"], (9, 7))
