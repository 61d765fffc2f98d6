"""Tars and sidecars made to break their reader: each ends in damage or DataError, at once and in little memory."""

import io
import json
import tarfile

import pytest

from trichord.core.errors import DataError
from trichord.shards import sidecars
from trichord.shards.index import build_index, load_header, load_index
from trichord.shards.storage import read_whole


def tar_with(path, records: bytes = b"", behind: bytes = b"") -> str:
    """A tar of two samples; `records` in front of the first, `behind` between them."""
    buffer = io.BytesIO()
    for number, extra in enumerate((records, behind)):
        buffer.write(extra)
        info = tarfile.TarInfo(f"{number}.txt")
        info.size = 5
        buffer.write(info.tobuf(tarfile.USTAR_FORMAT) + b"hello".ljust(512, b"\0"))
    path.write_bytes(buffer.getvalue() + b"\0" * 1024)
    return str(path)


def header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    info = tarfile.TarInfo("record")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 6, b"a.txt\0") * 3000, "more than 64 records"),
        (header(tarfile.XHDTYPE, 9, b"9 path=a\n") * 3000, "more than 64 records"),
        (header(tarfile.XHDTYPE, 2**33), "a record of 8589934592 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, 2**40), "a record of 1099511627776 bytes"),
        (header(tarfile.REGTYPE, -512), "a size of -512 bytes"),
        (header(tarfile.XHDTYPE, 13, b"13 size=-512\n"), "size of -512 bytes"),
    ],
)
def test_header_that_lies_is_damage_and_the_samples_before_it_are_read(tmp_path, behind, said):
    index = build_index(tar_with(tmp_path / "shard.tar", behind=behind))
    assert index.num_samples <= 1
    assert said in (index.damage or "")


def test_names_as_long_as_pax_allows_are_read(tmp_path):
    name = "d/" * 2000 + "x.txt"
    record = f"{len(name) + 11} path={name}\n".encode()
    assert len(record) == len(name) + 11
    index = build_index(tar_with(tmp_path / "shard.tar", records=header(tarfile.XHDTYPE, len(record), record)))
    assert index.entry(0).members["text"].name == name


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", 0.5), ("samples", True), ("samples", -1), ("unsafe_members", "many"), ("unsafe_members", []),
     ("damage", 5), ("columns", [[["text"], "txt"]]), ("idx", {"bytes": 5}), ("body", 5)],
)  # fmt: skip
def test_sidecar_header_of_wrong_types_is_made_anew(tmp_path, key, value):
    url = tar_with(tmp_path / "shard.tar")
    build_index(url)
    place = tmp_path / "shard.len"
    first, _, rest = place.read_bytes().partition(b"\n")
    fields = {**json.loads(first), key: value}
    place.write_bytes(json.dumps(fields, separators=(",", ":")).encode() + b"\n" + rest)
    found = load_header(url)
    assert (found.num_samples, found.damage, found.unsafe_members) == (2, None, 0)


def forge(folder, idx: bytes | None = None, body: bytes | None = None) -> None:
    """Replace sidecar content and have the header vouch for it."""
    place = folder / "shard.len"
    first, _, rest = place.read_bytes().partition(b"\n")
    idx, body = idx or (folder / "shard.idx").read_bytes(), body or rest
    fields = {**json.loads(first), "idx": sidecars.digest(idx), "body": sidecars.digest(body)}
    (folder / "shard.idx").write_bytes(idx)
    place.write_bytes(json.dumps(fields, separators=(",", ":")).encode() + b"\n" + body)


@pytest.mark.parametrize("number", ["-1", str(2**63), str(2**70), "9" * 5000, "x"])
@pytest.mark.parametrize("column", [1, 2])
def test_forged_positions_end_in_a_message(tmp_path, number, column):
    url = tar_with(tmp_path / "shard.tar")
    build_index(url)
    lines = (tmp_path / "shard.idx").read_text().splitlines()
    words = lines[1].split()
    words[column] = number
    forge(tmp_path, idx="\n".join([lines[0], " ".join(words), lines[2], ""]).encode())
    with pytest.raises(DataError, match="damaged at sample 0"):
        load_index(url).entry(0)


@pytest.mark.parametrize("line", [b'[5,{"problem":7}]', b"[" * 5000, b'[5,{"names":[1]}]', b"[[1],2]", b"5", b"[-5]"])
def test_forged_measures_end_in_a_message(tmp_path, line):
    url = tar_with(tmp_path / "shard.tar")
    build_index(url)
    forge(tmp_path, body=line + b"\n[5]\n")
    with pytest.raises(DataError, match="damaged at sample 0"):
        load_index(url).entry(0)


def test_forged_reason_is_cut_to_what_a_line_of_quarantine_can_hold(tmp_path):
    url = tar_with(tmp_path / "shard.tar")
    build_index(url)
    forge(tmp_path, body=b'["' + b"a" * 9000 + b'"]\n[5]\n')
    assert len(load_index(url).entry(0).problem or "") < 1100


def test_a_generous_bound_costs_no_memory(tmp_path):
    (tmp_path / "small").write_bytes(b"hello")
    assert read_whole(str(tmp_path / "small"), 1 << 50) == b"hello"
    with pytest.raises(DataError, match="more than 4 bytes"):
        read_whole(str(tmp_path / "small"), 4)


def test_name_that_no_file_system_has_made_is_of_no_sample(tmp_path):
    name = "d/" * 9000 + "x.txt"
    record = f"{len(name) + 12} path={name}\n".encode()
    assert len(record) == len(name) + 12
    index = build_index(tar_with(tmp_path / "shard.tar", records=header(tarfile.XHDTYPE, len(record), record)))
    assert [index.entry(number).key for number in range(index.num_samples)] == ["1"]
    assert index.damage is None
