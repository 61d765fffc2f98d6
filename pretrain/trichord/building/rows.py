"""One sample to write: its key, and where the bytes of its members are. Converters make rows, the writer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trichord.shards.members import is_unsafe, split_name
from trichord.shards.quarantine import BadSample

_BLOCK = 512
_USTAR_NAME_BYTES = 100


class FilePart(NamedTuple):
    """A whole file that had `size` bytes when the build was planned. Paths in parts are absolute: they travel."""

    path: str
    size: int


class RangePart(NamedTuple):
    """`size` bytes at `offset` of a shard: a member that is copied."""

    url: str
    offset: int
    size: int


class CellPart(NamedTuple):
    """`size` bytes in a cell of a parquet or arrow file.

    batch: number of the row group or record batch. row: in it. steps: column, then names and places inside the value.
    """

    path: str
    batch: int
    row: int
    steps: tuple[str | int, ...]
    size: int


Part = bytes | FilePart | RangePart | CellPart
Content = bytes | Path | FilePart | RangePart | CellPart


@dataclass(frozen=True)
class BuildRow:
    """One sample to write: its key, and per extension the bytes or where they are.

    origin: where the sample stands in its source, for messages (`captions.csv, line 7`); empty: the key says it.
    group: sub-folder of the shards that it goes to; empty: the folder itself.
    """

    key: str
    members: Mapping[str, Content] = field(default_factory=dict)
    origin: str = ""
    group: str = ""

    @property
    def place(self) -> str:
        """Where to look for the sample, in a message."""
        return self.origin or f"sample {self.key!r}"


@dataclass(frozen=True)
class BadRow:
    """What stands in a source where a sample was expected, and why it is none."""

    origin: str
    reason: str


def located(row: BuildRow) -> BuildRow:
    """The row with the size of every part known: files are looked up.

    Raises:
        BadSample: the row would not read back as it is, or a file of it cannot be found.
    """
    check_names(row)
    parts = {ext: _file_part(content) if isinstance(content, Path) else content for ext, content in row.members.items()}
    return BuildRow(row.key, parts, row.origin, row.group)


def check_names(row: BuildRow) -> None:
    """Raises BadSample where key and extensions would not read back by webdataset's rule, or mean pickled code."""
    if not row.members:
        raise BadSample("has no member; give it an image, an audio clip or a text")
    for ext in row.members:
        if split_name(f"{row.key}.{ext}") != (row.key, ext) or "\0" in row.key + ext:
            raise BadSample(
                f"key {row.key!r} with extension {ext!r} does not read back: the file name in a key must hold no dot "
                "and not be empty; rename it, for example with underscores"
            )
        if is_unsafe(ext):
            raise BadSample(f"extension {ext!r} means pickled code, which shards must not hold")


def tar_bytes(row: BuildRow) -> int:
    """Bytes that a located row takes in a tar: a header and whole blocks per member."""
    total = 0
    for ext, part in row.members.items():
        size = len(part) if isinstance(part, bytes) else part.size  # type: ignore[union-attr]
        long_name = len(f"{row.key}.{ext}".encode(errors="surrogateescape")) > _USTAR_NAME_BYTES
        total += _BLOCK * (1 + 2 * long_name - (-size // _BLOCK))
    return total


def _file_part(path: Path) -> FilePart:
    try:
        return FilePart(str(path.absolute()), path.stat().st_size)
    except OSError as error:
        raise BadSample(f"cannot read {path} ({error.strerror}); check the path") from error
