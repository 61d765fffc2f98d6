"""Sources ready to be read: sample number -> entry -> bytes of a member."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.core.phase import set_phase
from trichord.shards.config import ShardsConfig, SourceConfig
from trichord.shards.follow import FollowLog, ShardFinder, content_digest
from trichord.shards.index import SampleEntry, ShardHeader, ShardIndex, index_shards, load_index
from trichord.shards.locations import shown
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.sources import expand_shards
from trichord.shards.storage import configure_storage, read_range, with_retries

_log = get_logger(__name__)
MAX_CACHED_INDICES = 64


class SourceTable:
    """All samples of one source, numbered through its shards in order of appearance: sorted, and where the source is
    followed, those that each epoch adds after those before.

    Holds a few numbers per shard; the index of a shard is loaded when one of its samples is asked for, and the last
    `MAX_CACHED_INDICES` are kept. Travels to worker processes by fork or by pickle.

    Args:
        shards: of the source, or of the first epoch of a followed one. log: of a followed one.
    """

    def __init__(
        self,
        config: SourceConfig,
        shards: Sequence[ShardHeader],
        max_members: int | None = None,
        log: FollowLog | None = None,
    ):
        self.config = config
        self.shards: list[str] = []
        self.shard_sizes: list[int] = []
        self.digest = content_digest(shards)
        """Hash over samples and index of each shard in order (of the first epoch, where more may come)."""
        self._headers: list[ShardHeader] = []
        self._ends: list[int] = []
        self._max_members = max_members
        self._log = log
        self._known_at: list[int] = []  # shards of each epoch that was looked at, of a followed source
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._append(shards)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def headers(self) -> Sequence[ShardHeader]:
        """Of the shards known so far, in their order."""
        return self._headers

    @property
    def num_samples(self) -> int:
        """Samples known so far; see `shards_at` for those of an epoch."""
        return self._ends[-1] if self._ends else 0

    def shards_at(self, epoch: int) -> int:
        """How many of the shards an epoch has. In a followed source the first to ask for an epoch looks for new ones.

        Raises:
            DataError: a shard of an earlier epoch is gone or has changed, or the record of an epoch cannot be used.
        """
        if self._log is None:
            return len(self.shards)
        while len(self._known_at) <= epoch:
            finder = ShardFinder(self.config)
            shards, samples = len(self.shards), self.num_samples
            if not self._read_record(finder):
                added = finder.look(self._headers)
                recorded = self._log.record(len(self._known_at), self._headers, added)
                self._append(finder.find_again(recorded))  # those of another process, where it was first
            if len(self.shards) > shards:
                _log.info(
                    "source %s: %d new shards with %d samples join at epoch %d",
                    *(self.name, len(self.shards) - shards, self.num_samples - samples, len(self._known_at) - 1),
                )
        return self._known_at[epoch]

    def samples_at(self, epoch: int) -> int:
        """How many samples an epoch has; raises as `shards_at` does."""
        count = self.shards_at(epoch)
        return self._ends[count - 1] if count else 0

    def entry(self, sample: int) -> SampleEntry:
        """What is known of sample `sample` (0 <= sample < num_samples), read from the sidecars of its shard."""
        if sample >= self.num_samples:
            self.catch_up()
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"source {self.name!r} has samples 0 to {self.num_samples - 1}, asked for {sample}")
        shard = bisect_right(self._ends, sample)
        row = sample - (self._ends[shard] - self.shard_sizes[shard])
        return self._index(shard).entry(row, self.config.fields, self._max_members)

    def damage_records(self) -> list[QuarantineRecord]:
        """One record per shard that could not be read to its end."""
        return [
            QuarantineRecord(shard.url, None, None, None, shard.damage, self.name)
            for shard in self._headers
            if shard.damage is not None
        ]

    def catch_up(self) -> None:
        """Learn of all epochs that are recorded: this process may have begun before a shard appeared."""
        finder = ShardFinder(self.config)
        while self._read_record(finder):
            pass

    def _read_record(self, finder: ShardFinder) -> bool:
        """Learn of the next epoch from its record; whether there is one."""
        recorded = None if self._log is None else self._log.read(len(self._known_at), self._headers)
        if recorded is None:
            return False
        self._append(finder.find_again(recorded))
        return True

    def _append(self, shards: Sequence[ShardHeader]) -> None:
        for shard in shards:
            self._headers.append(shard)
            self.shards.append(shard.url)
            self.shard_sizes.append(shard.num_samples)
            self._ends.append(self.num_samples + shard.num_samples)
        self._known_at.append(len(self.shards))

    def _index(self, shard: int) -> ShardIndex:
        index = self._indices.get(shard)
        if index is None:
            index, known = load_index(self.shards[shard], self.config.fields), self._headers[shard]
            now = ShardHeader.of(known.url, index.header)
            if (now.num_samples, now.idx) != (known.num_samples, known.idx):
                raise DataError(
                    f"shard {known.url} changed while it was in use: it had {known.num_samples} samples with index "
                    f"{known.idx} and has {now.num_samples} with {now.idx} now; start again so that all processes see "
                    "the same data"
                )
            self._indices[shard] = index
            if len(self._indices) > MAX_CACHED_INDICES:
                self._indices.popitem(last=False)
        else:
            self._indices.move_to_end(shard)
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}


def open_sources(config: ShardsConfig, follow_folder: Path | None = None) -> list[SourceTable]:
    """One table per source, in the order of the config; missing or stale sidecars are built (see `index_shards`).

    Args:
        follow_folder: where followed sources record the shards of each epoch, the same for all processes of the run.

    Raises:
        ConfigError: a source is followed, and there is no folder for its records.
        DataError: a source has no shard or no sample, or a shard cannot be read.
    """
    configure_storage(config.storage)
    tables = []
    for source in config.sources:
        table = _open_source(source, config.max_members_per_sample, follow_folder)
        if table.num_samples == 0:
            named = ", ".join(table.shards[:3]) + (", ..." if len(table.shards) > 3 else "")
            reasons = [record.reason for record in table.damage_records()]
            raise DataError(
                f"source {source.name!r} has no samples in {len(table.shards)} shards ({named})"
                + (f": {reasons[0]}" if reasons else "")
                + "; members must be named KEY.EXTENSION, see `trichord data build`"
            )
        for record in table.damage_records():
            _log.warning("source %s: shard %s: %s", source.name, record.shard, record.reason)
        tables.append(table)
    return tables


def _open_source(source: SourceConfig, max_members: int, follow_folder: Path | None) -> SourceTable:
    if not source.follow:
        shards = index_shards(expand_shards(source), fields=source.fields)
        _warn_of_pickles(source, shards)
        return SourceTable(source, shards, max_members)
    if follow_folder is None:
        raise ConfigError(
            f"source {source.name!r} is followed, which needs a folder that records the shards of each epoch; training "
            "has one, here set `follow: false` to read the shards that are there now"
        )
    log, finder = FollowLog(follow_folder, source.name), ShardFinder(source)
    recorded = log.read(0, [])
    if recorded is None:
        found = finder.look([])
        if not any(shard.num_samples for shard in found):
            return SourceTable(source, found, max_members)  # the caller says so; nothing is recorded
        recorded = log.record(0, [], found)
    shards = finder.find_again(recorded)
    _warn_of_pickles(source, shards)
    table = SourceTable(source, shards, max_members, log)
    table.catch_up()
    return table


def _warn_of_pickles(source: SourceConfig, shards: Sequence[ShardHeader]) -> None:
    unsafe = sum(shard.unsafe_members for shard in shards)
    if unsafe:
        _log.warning("source %s: %d members with pickled code (.pyd, .pkl, .pth, ...) ignored", source.name, unsafe)


def read_member(entry: SampleEntry, field: str, max_bytes: int) -> bytes:
    """The bytes of one field of a sample (`image`, `audio`, `text`, `meta`).

    Raises:
        BadSample: the sample has no such field, the member is larger than `max_bytes`, or its shard is cut before it.
        DataError: the storage still failed after retries; the run stops.
    """
    ref = entry.members.get(field)
    if ref is None:
        raise BadSample(f"the sample has no {field}; it has {', '.join(sorted(entry.members)) or 'nothing'}")
    return read_ref(entry.shard, ref, max_bytes)


def read_ref(shard: str, ref: MemberRef, max_bytes: int) -> bytes:
    """The bytes of one member of a shard.

    Raises:
        BadSample: the member is larger than `max_bytes`, or its shard is cut before it.
        DataError: the storage still failed after retries; the run stops.
    """
    if ref.size > max_bytes:
        raise BadSample(f"{ref.size} bytes, more than shards.max_member_bytes {max_bytes}", ref.name)
    if ref.size == 0:
        return b""
    what = f"reading member {ref.name!r} of shard {shown(shard)}"
    set_phase("read", shard=shard, member=ref.name)
    data = with_retries(lambda: read_range(shard, ref.offset, ref.size), what)
    if len(data) != ref.size:
        raise BadSample(f"cut: {len(data)} of {ref.size} bytes are there", ref.name)
    return data
