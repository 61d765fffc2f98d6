"""The index of a shard: any sample is a seek, and every length is known before anything is decoded.

Torch-free and numpy-free: a login node builds it. Pillow and soundfile are imported only when members are measured.
"""

import json
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.core.processes import enter_worker
from trichord.core.stopping import signals_held
from trichord.shards import sidecars
from trichord.shards.config import FieldsConfig, StorageConfig
from trichord.shards.entries import FieldMap, Measures, SampleEntry, Sibling, make_entry
from trichord.shards.foreign_idx import note_on_idx
from trichord.shards.gathering import GatheredSample, gather_samples, kinds_by_ext, walk_shard
from trichord.shards.locations import is_remote, shown
from trichord.shards.members import MemberRef, WalkReport, split_name, walk_members
from trichord.shards.patience import settings
from trichord.shards.sidecars import LenHeader
from trichord.shards.storage import configure_storage, open_shard, shard_identity, with_retries

__all__ = [
    "Look",
    "MemberRef",
    "SampleEntry",
    "ShardHeader",
    "ShardIndex",
    "Sibling",
    "build_index",
    "index_shards",
    "load_header",
    "load_index",
    "look_at",
    "walk_shard",
]

_log = get_logger(__name__)
_LOOKS_AT_ONCE = 16
Result = TypeVar("Result")
_DEFAULT_FIELDS = FieldsConfig()


class ShardHeader(NamedTuple):
    """What `open_sources` needs of a shard: how many samples, what is wrong with it as a whole, hash of its `.idx`."""

    url: str
    num_samples: int
    damage: str | None
    unsafe_members: int
    idx: str

    @staticmethod
    def of(url: str, header: LenHeader) -> "ShardHeader":
        return ShardHeader(url, header.samples, header.damage, header.unsafe_members, str(header.idx["blake2b"]))


class Look(NamedTuple):
    """What a look at a shard tells without reading it, and without making anything.

    bytes: its size now. header: what its sidecars say, None where there are none, or none of this version of it.
    recorded_bytes: the size that its sidecars, current or stale, were made for; None: there are none.
    """

    url: str
    bytes: int
    header: ShardHeader | None
    recorded_bytes: int | None


class ShardIndex:
    """The two sidecars of one shard in memory, as bytes; a sample's lines are parsed when asked for."""

    def __init__(self, url: str, header: LenHeader, idx: bytes, lengths: bytes):
        self.url = url
        self.header = header
        self._idx, self._idx_starts = idx, sidecars.line_starts(idx, header.samples)
        self._lengths, self._length_starts = lengths, sidecars.line_starts(lengths, header.samples)
        self._columns = {pair: number for number, pair in enumerate(header.columns)}
        self._fields: tuple[FieldsConfig, FieldMap] | None = None

    @property
    def num_samples(self) -> int:
        return self.header.samples

    @property
    def damage(self) -> str | None:
        """Why the tar could not be read to its end; its whole samples are there nevertheless."""
        return self.header.damage

    @property
    def unsafe_members(self) -> int:
        return self.header.unsafe_members

    def entry(self, sample: int, fields: FieldsConfig | None = None, max_members: int | None = None) -> SampleEntry:
        """Sample number `sample` of the shard, its members mapped to fields.

        A sample that cannot be used has `problem` set: two members of one extension, no mapped member, more members
        than `max_members`, or a member of a field that could not be measured.
        """
        try:
            members = self.members(sample)
            values: list[Any] = json.loads(_line(self._lengths, self._length_starts, sample).decode())
            extra = values.pop() if len(values) > len(self._columns) else {}
            if not isinstance(extra.get("problem"), str | None):
                raise TypeError("a problem that is no text")
            if "names" in extra:
                members = _renamed(members, extra["names"])
            measures = Measures(self._columns, values, extra.get("numbered", {}))
            return make_entry(self.url, members, measures, extra.get("problem"), self._field_map(fields), max_members)
        except (ValueError, IndexError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"the sidecar of {self.url} is damaged at sample {sample} ({type(error).__name__}: {error}); "
                "remove its .idx and .len files, they are made again"
            ) from error

    def members(self, sample: int) -> list[MemberRef]:
        """All members of a sample in the order of the tar, those that no field reads among them; names as `.idx` has
        them, white space written as `%20`. Raises ValueError where the line is damaged."""
        return sidecars.parse_idx_line(_line(self._idx, self._idx_starts, sample))

    def _field_map(self, fields: FieldsConfig | None) -> FieldMap:
        """A source asks with one FieldsConfig for all its samples: the last map is kept."""
        fields = fields or _DEFAULT_FIELDS
        if self._fields is None or self._fields[0] is not fields:
            self._fields = fields, FieldMap(fields)
        return self._fields[1]


def build_index(url: str, fields: FieldsConfig | None = None) -> ShardIndex:
    """Read a shard from front to back, measure its members, write `.idx` and `.len`, and return the index.

    Args:
        url: the tar. fields: which extensions are images, audio and text; the default ones are always measured too.

    Raises:
        DataError: the shard cannot be read, is compressed or no tar, or the sidecars cannot be written.
    """
    identity = shard_identity(url)
    kinds = kinds_by_ext(fields or FieldsConfig())

    def walk() -> tuple[list[GatheredSample], WalkReport]:
        report = WalkReport()
        with open_shard(url) as file:
            size = file.seek(0, os.SEEK_END)  # of what is read: of a tar.gz, the unpacked one
            return gather_samples(walk_members(file, size, url, report), kinds, report), report

    samples, report = with_retries(walk, f"indexing shard {url}")
    idx = f"{sidecars.IDX_VERSION} {len(samples)}\n" + "".join(sidecars.idx_line(sample.members) for sample in samples)
    idx_bytes = idx.encode(errors="surrogateescape")
    columns = tuple(sorted({pair for sample in samples for pair in sample.measures}))
    covered = sorted({(kind, ext) for ext, found in kinds.items() for kind in found})
    body = "".join(sample.len_line(columns) for sample in samples).encode()
    header = LenHeader(
        shard=identity,
        samples=len(samples),
        idx=sidecars.digest(idx_bytes),
        body=sidecars.digest(body),
        columns=columns,
        covered=tuple(covered),
        unsafe_members=report.unsafe_members,
        damage=report.damage,
    )
    lengths = header.to_line().encode() + body
    note = note_on_idx(url, idx_bytes, samples)
    if note is not None:
        _log.warning("%s.idx: %s", shown(sidecars.sidecar_places(url)[0]), note)
    sidecars.write_sidecars(url, idx_bytes, lengths)
    return ShardIndex(url, header, idx_bytes, lengths)


def load_index(url: str, fields: FieldsConfig | None = None) -> ShardIndex:
    """The index of a shard from its sidecars; built anew where missing, damaged, or of another version of it."""
    fresh = _fresh(url, fields)
    if fresh is not None:
        place, header = fresh
        try:
            idx, lengths = sidecars.read_sidecars(place)
            if sidecars.digest(idx) == header.idx and sidecars.is_whole(header, lengths):
                return ShardIndex(url, header, idx, lengths)
            _log.warning("sidecars of %s do not match their digests; building them anew", url)
        except (OSError, ValueError, DataError) as error:
            _log.warning("sidecars of %s cannot be read (%s); building them anew", url, error)
    return build_index(url, fields)


def load_header(url: str, fields: FieldsConfig | None = None) -> ShardHeader:
    """How many samples a shard has: one line is read where the sidecars are fresh, else they are built."""
    fresh = _fresh(url, fields)
    header = fresh[1] if fresh is not None else build_index(url, fields).header
    return ShardHeader.of(url, header)


def look_at(url: str, fields: FieldsConfig | None = None) -> Look:
    """Is the shard there, and are its sidecars current? Raises DataError where it cannot be found."""
    identity = shard_identity(url)
    size = int(identity["size"])
    fresh = _fresh(url, fields, identity)
    if fresh is not None:
        return Look(url, size, ShardHeader.of(url, fresh[1]), size)
    stale = [header for place in sidecars.sidecar_places(url) if (header := sidecars.read_header(place)) is not None]
    return Look(url, size, None, int(stale[0].shard["size"]) if stale else None)


def index_shards(
    urls: Sequence[str],
    workers: int = 1,
    on_progress: Callable[[int, int, str], None] | None = None,
    fields: FieldsConfig | None = None,
    on_failure: Callable[[str, DataError], None] | None = None,
) -> list[ShardHeader]:
    """Make the sidecars of all shards current, `workers` processes at a time; fresh ones cost one look.

    Args:
        on_progress: called as (done, total, url) after each shard, in the order they get done.
        on_failure: called for each shard that cannot be indexed, and the others go on; None: it ends the indexing.

    Returns:
        One header per URL that is indexed now, in the order of `urls`.
    """
    lenient, unique = on_failure is not None, list(dict.fromkeys(urls))
    found: dict[str, ShardHeader | None] = {}

    def note(url: str, result: ShardHeader | DataError) -> None:
        found[url] = None if isinstance(result, DataError) else result
        if isinstance(result, DataError) and on_failure is not None:
            on_failure(url, result)
        if on_progress is not None:
            on_progress(len(found), len(unique), url)

    todo = []
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:  # looking at a remote shard is waiting
        for url, look in zip(unique, threads.map(lambda url: _attempt(lenient, _fresh, url, fields), unique)):
            if look is None:
                todo.append(url)
            else:
                note(url, look if isinstance(look, DataError) else ShardHeader.of(url, look[1]))
    if workers <= 1 or len(todo) <= 1:
        for url in todo:
            note(url, _attempt(lenient, load_header, url, fields))
    else:
        # spawn: the caller may hold threads (torch, an event loop of fsspec) that do not survive a fork
        told = (os.getpid(), settings())
        with ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn"), _enter_indexer, told) as pool:
            with signals_held():
                started = {pool.submit(_attempt, lenient, load_header, url, fields): url for url in todo}
            for future in as_completed(started):
                note(started[future], future.result())
    return [header for url in urls if (header := found[url]) is not None]


def _attempt(lenient: bool, action: Callable[..., Result], *arguments: Any) -> Result | DataError:
    """What `action` returns, or if `lenient` the DataError that it raises."""
    try:
        return action(*arguments)
    except DataError as error:
        if not lenient:
            raise
        return error


def _enter_indexer(parent_pid: int, storage: StorageConfig) -> None:
    enter_worker(parent_pid)
    configure_storage(storage)


def _fresh(
    url: str, fields: FieldsConfig | None, identity: dict[str, int | str] | None = None
) -> tuple[str, LenHeader] | None:
    """Place and header of sidecars that describe the shard as it is now and cover the mapped extensions."""
    identity = identity or shard_identity(url)
    wanted = {(kind, ext) for ext, kinds in kinds_by_ext(fields or FieldsConfig()).items() for kind in kinds}
    places = sidecars.sidecar_places(url)
    for place in reversed(places) if is_remote(url) else places:  # a remote one is asked only where there is none here
        header = sidecars.read_header(place)
        if header is not None and header.shard == identity and wanted <= set(header.covered):
            return place, header
    return None


def _line(data: bytes, starts: array, sample: int) -> bytes:
    return data[starts[sample] : starts[sample + 1]]


def _renamed(members: list[MemberRef], names: list[str]) -> list[MemberRef]:
    """Members with their exact names, and the extensions that follow from these."""
    exts = [(split_name(name) or ("", ""))[1].lower() for name in names]
    return [ref._replace(ext=ext, name=name) for ref, ext, name in zip(members, exts, names)]
