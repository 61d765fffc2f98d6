"""Broken tars: whole samples are used, everything else is one line, and nothing ends quietly."""

import functools
import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trichord.core.errors import DataError
from trichord.shards.index import build_index, load_index
from trichord.shards.members import is_unsafe, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("a", "txt")),
        ("d.e/a.b.txt", ("d.e/a", "b.txt")),
        ("./a.txt", ("./a", "txt")),
        ("README", None),
        (".hidden", None),
        ("d/.hidden.txt", None),
        ("d.e/README", None),
        ("a.", None),
    ],
)
def test_split_name_agrees_with_webdataset(name, expected):
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == expected
    # webdataset makes an empty extension of `a.`, which no .idx can hold, and a key `d/` of `d/.hidden.txt`
    if name not in ("a.", "d/.hidden.txt"):
        assert base_plus_ext(name) == (expected or (None, None))


@pytest.mark.parametrize(
    ("ext", "unsafe"), [("pkl", True), ("a.PYD", True), ("pt", True), ("ptx", False), ("pkl.txt", False)]
)
def test_unsafe_extensions(ext, unsafe):
    assert is_unsafe(ext) is unsafe


SAMPLES = 5


@functools.cache
def whole_tar() -> bytes:
    """Five samples of a json and a text, one with a PAX header; each text holds its number and fills 1.5 blocks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(SAMPLES):
            key = "long" * 40 + str(number) if number == 3 else str(number)
            for ext, data in (("json", b"{}"), ("txt", str(number).encode() * 768)):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _check_usable(path: Path) -> tuple[int, str | None]:
    """Each sample of the index is whole; returns their number and the damage."""
    index = build_index(str(path))
    data = path.read_bytes()
    for number in range(index.num_samples):
        entry = index.entry(number)
        assert sorted(entry.members) == ["meta", "text"]
        ref = entry.members["text"]
        assert data[ref.offset : ref.offset + ref.size] == str(number).encode() * 768
    return index.num_samples, index.damage


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(whole_tar())))
def test_a_tar_cut_anywhere_gives_its_whole_samples(tmp_path, cut):
    _check_cut(tmp_path, cut)


def test_a_tar_cut_between_blocks_gives_its_whole_samples(tmp_path):
    for cut in range(0, len(whole_tar()), 512):
        _check_cut(tmp_path, cut)


def _check_cut(tmp_path: Path, cut: int) -> None:
    whole = whole_tar()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:cut])
    samples, damage = _check_usable(path)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 1024
    if cut >= end + 512:  # the padding after the end marker is nobody's loss
        assert (samples, damage) == (SAMPLES, None)
        return
    # a sample counts as whole once a member of the next one has begun: its name shows that nothing is missing
    begun = [member for member in members if member.offset_data <= cut]
    assert samples == max(0, len({member.name.split(".")[0] for member in begun}) - 1)
    assert str(cut) in damage


# tarfile raises on the header behind a PAX header, and stops without a word on any other
_NOTICED = {b"\0": ("with data again", "end of file header"), b"\xff": ("unreadable header", "checksum")}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=st.integers(0, 40), fill=st.sampled_from([b"\0", b"\xff"]))
def test_a_header_overwritten_anywhere_is_noticed(tmp_path, block, fill):
    whole = whole_tar()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = sorted(
            {info.offset for info in tar.getmembers()} | {info.offset_data - 512 for info in tar.getmembers()}
        )
    start = headers[block % len(headers)]
    path = tmp_path / "hole.tar"
    path.write_bytes(whole[:start] + fill * 512 + whole[start + 512 :])
    if start == 0 and fill != b"\0":
        with pytest.raises(DataError, match="no tar file"):
            build_index(str(path))
        return
    samples, damage = _check_usable(path)
    assert samples < SAMPLES
    assert any(words in damage for words in _NOTICED[fill]), damage


def test_damage_is_one_line_and_survives_a_reload(tmp_path):
    path = tmp_path / "cut.tar"
    path.write_bytes(whole_tar()[: 512 * 9 + 100])
    damage = build_index(str(path)).damage
    assert damage == (
        "member '1.txt' is cut: it needs 768 bytes at byte 4096, and the file ends at byte 4708; "
        "sample '1' is left out, the 1 whole samples before it are used"
    )
    assert load_index(str(path)).damage == damage


def test_two_tars_in_one_file_do_not_pass_silently(tmp_path):
    path = tmp_path / "two.tar"
    path.write_bytes(whole_tar() * 2)
    samples, damage = _check_usable(path)
    assert samples == SAMPLES - 1
    assert "with data again" in damage


@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_a_file_without_a_header_has_no_samples_and_one_line(tmp_path, data):
    path = tmp_path / "empty.tar"
    path.write_bytes(data)
    assert build_index(str(path)).damage == f"the file has {len(data)} bytes, less than one tar header"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.tar"
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(DataError, match=r"other\.tar is no tar file.*web page"):
        build_index(str(path))
    path.write_bytes(gzip.compress(whole_tar()))
    with pytest.raises(DataError, match=r"other\.tar is compressed with gzip.*unpack it once"):
        build_index(str(path))


def test_folders_and_links_are_no_members(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d.txt", tarfile.DIRTYPE), ("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("f.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    index = build_index(str(path))
    assert [index.entry(number).key for number in range(index.num_samples)] == ["f"]
