"""Walking a tar: which members it holds, which sample each belongs to, and where it breaks off."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from trichord.core.errors import DataError

UNSAFE_EXTENSIONS = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
"""Members that hold pickled code. They are never opened: reading one can run it."""

_BLOCK = 512
_MAX_NAME_BYTES = 4096  # PATH_MAX: no file system has made a longer one
_MAX_RECORDS = 64
_MAX_RECORD_BYTES = 1 << 20
_RECORDS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_CHUNK = 1 << 20
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")
_MAGIC_NUMBERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class MemberRef(NamedTuple):
    """Where one file of a sample lies in its tar. `ext` is in lower case; `offset` and `size` are in bytes."""

    ext: str
    name: str
    offset: int
    size: int


class FoundMember(NamedTuple):
    """A member met on the walk, with the open file that reads it."""

    key: str
    ref: MemberRef
    raw_ext: str
    file: IO[bytes]


@dataclass
class WalkReport:
    """What a walk over a whole tar found beside the members.

    damage: why the walk ended early (None: it did not). cut_key: key of the sample whose member is cut, where its name
    could still be read; where not, the last sample met may lack members.
    unsafe_members: how many were skipped for their extension. other_members: regular files that belong to no sample.
    """

    damage: str | None = None
    cut_key: str | None = None
    unsafe_members: int = 0
    other_members: int = 0
    last_member: str = field(default="", repr=False)


def split_name(name: str) -> tuple[str, str] | None:
    """webdataset's rule: the key ends at the first dot after the last slash, the rest is the extension.

    None for files that belong to no sample: no dot, a leading dot, or nothing after the dot.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/" or dot == len(name) - 1:
        return None
    return name[:dot], name[dot + 1 :]


def is_unsafe(ext: str) -> bool:
    """Whether the last part of an extension (in any case) names pickled code."""
    return ext.rsplit(".", 1)[-1].lower() in UNSAFE_EXTENSIONS


class _Tar(tarfile.TarFile):
    """Counts the records (PAX headers, GNU long names) in front of a member."""

    records = 0


class _Header(tarfile.TarInfo):
    """A header that stdlib may believe. It reads records by recursion and takes their sizes at their word."""

    def _proc_member(self, tarfile_: _Tar) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"a size of {self.size} bytes in the header of {self.name!r}")
        if self.type in _RECORDS:
            tarfile_.records += 1
            if tarfile_.records > _MAX_RECORDS:
                raise tarfile.ReadError(f"more than {_MAX_RECORDS} records in front of one member")
            if self.size > _MAX_RECORD_BYTES:
                raise tarfile.ReadError(f"a record of {self.size} bytes, at most {_MAX_RECORD_BYTES} are read")
        return super()._proc_member(tarfile_)


# What stdlib raises over headers that lie, beside its own errors; a failing storage raises OSError.
_HEADER_ERRORS = (tarfile.TarError, ValueError, IndexError, OverflowError)


def walk_members(file: IO[bytes], size: int, url: str, report: WalkReport) -> Iterator[FoundMember]:
    """Yield the members of a tar in file order and fill in `report`; headers (PAX, GNU long names) by stdlib tarfile.

    tarfile and webdataset end quietly at a cut header or a zeroed block; here every early end becomes `report.damage`.

    Args:
        file: the seekable tar; size: its length in bytes; url: its name in messages.

    Raises:
        DataError: the file is compressed, or is no tar at all.
    """
    _refuse_compressed(file, url)
    if size < _BLOCK:
        report.damage = f"the file has {size} bytes, less than one tar header"
        return
    if not any(file.read(_BLOCK)):  # an empty tar; Python 3.10's tarfile stumbles over it
        report.damage = _damage_at_end(file, 0, size, "")
        return
    file.seek(0)
    try:
        tar = _Tar.open(fileobj=file, mode="r:", errors="surrogateescape", tarinfo=_Header)  # the caller closes `file`
    except _HEADER_ERRORS as error:
        if not _starts_as_tar(file):
            raise DataError(
                f"shard {url} is no tar file ({error}); was a web page or a listing saved under its name?"
            ) from error
        report.damage = f"cut or damaged in its first header, {size} bytes in all ({error})"
        return
    while True:
        try:
            tar.records = 0
            info = tar.next()
            if info is not None and info.size < 0:
                raise tarfile.ReadError(f"a member has a size of {info.size} bytes")
        except _HEADER_ERRORS as error:
            report.damage = (
                f"cut or damaged after member {report.last_member!r}, at byte {tar.offset} of {size} ({error})"
            )
            return
        if info is None:
            report.damage = _damage_at_end(file, tar.offset, size, report.last_member)
            return
        tar.members = []  # tarfile keeps every header it has met; a shard can hold millions
        report.last_member = info.name[:_MAX_NAME_BYTES]
        found = _found(tar, info, report) if info.isfile() else None
        if info.isfile() and info.offset_data + info.size > size:
            report.damage = (
                f"member {report.last_member!r} is cut: it needs {info.size} bytes at byte {info.offset_data}, "
                f"and the file ends at byte {size}"
            )
            report.cut_key = (split_name(info.name) or (None,))[0]
            return
        if found is not None:
            yield found


def _found(tar: tarfile.TarFile, info: tarfile.TarInfo, report: WalkReport) -> FoundMember | None:
    """The member as part of a sample; None, counted, if it is none."""
    skipped = _WEBDATASET_META.match(info.name) or info.issparse() or _is_too_long(info.name)
    parts = None if skipped else split_name(info.name)
    if parts is None:
        report.other_members += 1
        return None
    key, ext = parts
    if is_unsafe(ext):
        report.unsafe_members += 1
    file = tar.extractfile(info)
    assert file is not None, "tarfile opens every regular member"
    return FoundMember(key, MemberRef(ext.lower(), info.name, info.offset_data, info.size), ext, file)


def _is_too_long(name: str) -> bool:
    return len(name) > _MAX_NAME_BYTES or len(name.encode(errors="surrogateescape")) > _MAX_NAME_BYTES


def _refuse_compressed(file: IO[bytes], url: str) -> None:
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    for magic, name in _MAGIC_NUMBERS.items():
        if start.startswith(magic):
            raise DataError(
                f"shard {url} is compressed with {name}, and samples in a compressed tar cannot be reached without "
                "reading all before them; unpack it once and name the .tar"
            )


def _starts_as_tar(file: IO[bytes]) -> bool:
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _damage_at_end(file: IO[bytes], stop: int, size: int, last_member: str) -> str | None:
    """Why the walk stopped at byte `stop`: None for a proper end (zero blocks and nothing after them)."""
    file.seek(stop)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return f"the file ends at byte {size} without an end marker, after member {last_member!r}"
    if any(block):
        return f"unreadable header at byte {stop} of {size}, after member {last_member!r}"
    position = stop + _BLOCK
    while chunk := file.read(_CHUNK):
        if any(chunk):
            return (
                f"end marker or zeroed block at byte {stop}, after member {last_member!r}, with data again in the "
                f"{size - position} bytes from byte {position}, which are not read"
            )
        position += len(chunk)
    return None
