"""Writing one shard: the bytes of `webdataset.TarWriter` with a fixed owner and time, by the standard library.

webdataset itself imports torch where that is installed; a worker that only copies files should not wait for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from trichord.building.rows import BuildRow, CellPart, Content, FilePart, RangePart
from trichord.building.spool import read_rows
from trichord.core.errors import DataError
from trichord.core.status import write_atomically
from trichord.shards.config import FieldsConfig
from trichord.shards.index import build_index
from trichord.shards.probes import Kind, measure
from trichord.shards.quarantine import BadSample
from trichord.shards.storage import read_range, with_retries

_KINDS: tuple[Kind, ...] = ("image", "audio", "text")
_HASH_CHUNK = 1 << 20


class ShardTask(NamedTuple):
    """Rows `first` to `last` of the order in `folder` become its file `NUMBER.tar`. Plain values: it travels.

    check_contents: look at the header of every image and clip. on_bad: stop or skip. fields: of FieldsConfig.
    """

    folder: str
    number: int
    first: int
    last: int
    check_contents: bool
    on_bad: str
    fields: dict[str, Any]

    @property
    def tar(self) -> Path:
        return Path(self.folder) / f"{self.number:06d}.tar"

    @property
    def done_file(self) -> Path:
        return self.tar.with_suffix(".json")


class ShardDone(NamedTuple):
    """A shard that is whole. left_out: [origin, reason] of each sample that is not in it."""

    number: int
    samples: int
    size: int
    blake2b: str
    left_out: list[list[str]]


class ShardStopped(NamedTuple):
    """What is wrong with a shard. by_source: a sample is bad, or a file is not what was listed; else the disk."""

    reason: str
    by_source: bool


class _SourceError(DataError):
    """Only another source mends it, or leaving the sample out."""


def make_shard(task: ShardTask) -> ShardDone | ShardStopped:
    """Write a shard and its sidecars, or find that a build which was cut off had done so.

    Any process of any machine that sees `folder` may run it, several at once too: the bytes are a function of the rows.
    """
    try:
        return _finished(task) or _write_shard(task)
    except DataError as error:
        return ShardStopped(str(error), isinstance(error, _SourceError))
    except OSError as error:
        reason = f"cannot write {task.tar}: {error.strerror or error}; mend that and run the same command again"
        return ShardStopped(reason, False)


def _finished(task: ShardTask) -> ShardDone | None:
    """The shard as an earlier attempt recorded it, if it still is that."""
    try:
        done = ShardDone(**json.loads(task.done_file.read_text()))
        with task.tar.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
            same = file.tell() == done.size and digest.hexdigest() == done.blake2b
    except (OSError, ValueError, TypeError):
        return None
    return done if same else None


def _write_shard(task: ShardTask) -> ShardDone:
    temporary = task.tar.with_name(f"{task.number:06d}.{os.getpid()}.tmp")
    left_out: list[list[str]] = []
    samples = 0
    fields = FieldsConfig(**task.fields)
    kinds = kinds_by_ext(fields)
    with temporary.open("wb") as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w|") as tar:  # type: ignore[call-overload]
            for row in read_rows(Path(task.folder), task.first, task.last):
                try:
                    members = _contents(row, kinds if task.check_contents else {})
                except BadSample as error:
                    if task.on_bad == "stop":
                        raise _SourceError(f"{row.place}: {error}{_HOW_TO_SKIP}") from error
                    left_out.append([row.place, str(error)])
                    continue
                add_sample(tar, row.key, members)
                samples += 1
    os.replace(temporary, task.tar)
    if samples:
        build_index(str(task.tar), fields)
    done = ShardDone(task.number, samples, hashing.size, hashing.digest.hexdigest(), left_out)
    write_atomically(task.done_file, json.dumps(done._asdict()))
    return done


_HOW_TO_SKIP = "; repair or remove it, or leave out what is bad by --on-bad skip"


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Append the members, sorted by extension."""
    for ext in sorted(members):
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size, info.mtime, info.mode = len(members[ext]), 0, 0o444
        info.uname = info.gname = "root"
        tar.addfile(info, io.BytesIO(members[ext]))


def kinds_by_ext(fields: FieldsConfig) -> dict[str, Kind]:
    """What the contents of an extension must be."""
    return {ext.lower(): kind for kind in _KINDS for ext in getattr(fields, kind)}


def kind_of(ext: str, kinds: Mapping[str, Kind]) -> Kind | None:
    """By the whole extension, else by its last part: `0.jpg` is an image."""
    return kinds.get(ext.lower()) or kinds.get(ext.lower().rsplit(".", 1)[-1])


def _contents(row: BuildRow, kinds: Mapping[str, Kind]) -> dict[str, bytes]:
    members = {}
    for ext, part in row.members.items():
        members[ext] = data = _read(part)
        kind = kind_of(ext, kinds)
        size = measure(kind, io.BytesIO(data), len(data)) if kind else None
        if isinstance(size, str):
            name = part.path if isinstance(part, FilePart) else f"{row.key}.{ext}"
            told = isinstance(part, FilePart) and Path(part.path).match(row.origin) if row.origin else False
            raise BadSample(size if told else f"{name}: {size}")
    return members


def _read(part: Content) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, FilePart):
        return _read_file(part)
    if isinstance(part, RangePart):
        data = with_retries(lambda: read_range(part.url, part.offset, part.size), f"copying from shard {part.url}")
        if len(data) != part.size:
            raise _SourceError(f"{part.url} is shorter than when the build was planned")
        return data
    assert isinstance(part, CellPart), "a located row has no other parts"
    from trichord.building.arrow import read_cell  # pyarrow only where there is such a file

    data = read_cell(part)
    if len(data) != part.size:
        raise _SourceError(f"{part.path} is another file than when the build was planned")
    return data


def _read_file(part: FilePart) -> bytes:
    try:
        data = Path(part.path).read_bytes()
    except OSError as error:
        raise _SourceError(
            f"cannot read {part.path} ({error.strerror}), which was there when the build began"
        ) from error
    if len(data) != part.size:
        raise _SourceError(f"{part.path} has {len(data)} bytes, and had {part.size} when the build was planned")
    return data


class _HashingFile:
    """Counts and hashes what passes through; tarfile's stream mode only ever appends."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.digest = hashlib.blake2b(digest_size=16)
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)
