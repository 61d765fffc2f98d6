"""Sources ready to be read: sample number -> entry -> bytes of a member."""

from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from typing import Any

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.config import ShardsConfig, SourceConfig
from trichord.shards.index import SampleEntry, ShardHeader, ShardIndex, load_header, load_index
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.sources import expand_shards
from trichord.shards.storage import read_range, with_retries

_log = get_logger(__name__)
MAX_CACHED_INDICES = 64


class SourceTable:
    """All samples of one source, numbered through its shards in sorted order.

    Holds a few numbers per shard; the index of a shard is loaded when one of its samples is asked for, and the last
    `MAX_CACHED_INDICES` are kept. Travels to worker processes by fork or by pickle.
    """

    def __init__(self, config: SourceConfig, shards: list[ShardHeader], max_members: int | None = None):
        self.config = config
        self.shards = [shard.url for shard in shards]
        self.shard_sizes = [shard.num_samples for shard in shards]
        self._damage = {shard.url: shard.damage for shard in shards if shard.damage is not None}
        self._ends = list(accumulate(self.shard_sizes))
        self._max_members = max_members
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def num_samples(self) -> int:
        return self._ends[-1] if self._ends else 0

    def entry(self, sample: int) -> SampleEntry:
        """What is known of sample `sample` (0 <= sample < num_samples), read from the sidecars of its shard."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"source {self.name!r} has samples 0 to {self.num_samples - 1}, asked for {sample}")
        shard = bisect_right(self._ends, sample)
        row = sample - (self._ends[shard] - self.shard_sizes[shard])
        return self._index(shard).entry(row, self.config.fields, self._max_members)

    def damage_records(self) -> list[QuarantineRecord]:
        """One record per shard that could not be read to its end."""
        return [QuarantineRecord(url, None, None, None, damage, self.name) for url, damage in self._damage.items()]

    def _index(self, shard: int) -> ShardIndex:
        index = self._indices.get(shard)
        if index is None:
            index = load_index(self.shards[shard], self.config.fields)
            if index.num_samples != self.shard_sizes[shard]:
                raise DataError(
                    f"shard {self.shards[shard]} changed while it was in use: it had {self.shard_sizes[shard]} samples "
                    f"and has {index.num_samples} now; start again so that all processes see the same data"
                )
            self._indices[shard] = index
            if len(self._indices) > MAX_CACHED_INDICES:
                self._indices.popitem(last=False)
        else:
            self._indices.move_to_end(shard)
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}


def open_sources(config: ShardsConfig) -> list[SourceTable]:
    """One table per source, in the order of the config; missing or stale sidecars are built (see `index_shards`).

    Raises:
        DataError: a source has no shard or no sample, or a shard cannot be read.
    """
    tables = []
    for source in config.sources:
        shards = [load_header(url, source.fields) for url in expand_shards(source)]
        table = SourceTable(source, shards, config.max_members_per_sample)
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
        unsafe = sum(shard.unsafe_members for shard in shards)
        if unsafe:
            _log.warning("source %s: %d members with pickled code (.pyd, .pkl, .pth, ...) ignored", source.name, unsafe)
        tables.append(table)
    return tables


def read_member(entry: SampleEntry, field: str, max_bytes: int) -> bytes:
    """The bytes of one field of a sample (`image`, `audio`, `text`, `meta`).

    Raises:
        BadSample: the sample has no such field, the member is larger than `max_bytes`, or its shard is cut before it.
        DataError: the storage still failed after retries; the run stops.
    """
    ref = entry.members.get(field)
    if ref is None:
        raise BadSample(f"the sample has no {field}; it has {', '.join(sorted(entry.members)) or 'nothing'}")
    if ref.size > max_bytes:
        raise BadSample(f"{ref.size} bytes, more than shards.max_member_bytes {max_bytes}", ref.name)
    if ref.size == 0:
        return b""
    what = f"reading member {ref.name!r} of shard {entry.shard}"
    data = with_retries(lambda: read_range(entry.shard, ref.offset, ref.size), what)
    if len(data) != ref.size:
        raise BadSample(f"cut: {len(data)} of {ref.size} bytes are there", ref.name)
    return data
