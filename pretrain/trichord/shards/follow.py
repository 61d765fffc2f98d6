"""Sources that grow: which shards belong to which epoch, recorded once, so that every process and every later resume
sees the same past.

`<folder>/<source>/epoch-NNNNNN.json` holds what an epoch adds to the epochs before it: new shards are appended, so the
numbers of samples stay what they were. The first process that comes to an epoch looks for new shards and records them;
the file appears whole and under its name only once (a hard link), and all others read it.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.shards.config import SourceConfig
from trichord.shards.index import ShardHeader, index_shards
from trichord.shards.locations import plain_name, shown
from trichord.shards.sources import expand_shards

_log = get_logger(__name__)
FOLLOW_FOLDER = "shards"
"""Of a run folder: where the shards of each epoch of its followed sources are recorded."""
_FORMAT = "trichord-epoch"
_VERSION = 1


class RecordedShard(NamedTuple):
    """A shard as it was when its first epoch began: its URL without query, its samples, the hash of its `.idx`."""

    url: str
    samples: int
    idx: str


class FollowLog:
    """The records of one source.

    Args:
        folder: of the run, for all its sources; the same for every process, on a file system they share.
    """

    def __init__(self, folder: Path, source_name: str):
        if source_name in (".", ".."):
            raise ConfigError(
                f"a followed source cannot be called {source_name!r}: its records have a folder of its name"
            )
        self.folder = Path(folder) / source_name
        self._source = source_name

    def read(self, epoch: int, known: Sequence[ShardHeader]) -> list[RecordedShard] | None:
        """The shards that are new in an epoch, after the `known` ones of the epochs before; None: not recorded yet.

        Raises:
            DataError: the record is damaged, or does not go on from these shards.
        """
        path = self._path(epoch)
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] != _FORMAT or fields["version"] != _VERSION or fields["epoch"] != epoch:
                raise ValueError(f"not a record of epoch {epoch} of version {_VERSION}")
            before = fields["known"], fields["known_digest"]
            added = [RecordedShard(str(url), int(samples), str(idx)) for url, samples, idx in fields["added"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"source {self._source!r}: the record {path} cannot be read ({type(error).__name__}: {error}); it says "
                "which shards the epoch has, so restore it, or start a new run"
            ) from error
        now = len(known), content_digest(known)
        if before != now:
            raise DataError(
                f"source {self._source!r}: {path} goes on from {before[0]} shards with digest {before[1]}, and the "
                f"records before it give {now[0]} with {now[1]}; the records of two runs are mixed up"
            )
        return added

    def record(self, epoch: int, known: Sequence[ShardHeader], added: Sequence[ShardHeader]) -> list[RecordedShard]:
        """Record what is new in an epoch, unless another process was first; what stands in the record.

        Raises:
            ConfigError: the file system has no hard links. DataError: the record cannot be written.
        """
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "source": self._source,
            "epoch": epoch,
            "known": len(known),
            "known_digest": content_digest(known),
            "added": [[plain_name(shard.url), shard.num_samples, shard.idx] for shard in added],
        }
        self._write_once(self._path(epoch), json.dumps(fields, indent=1) + "\n")
        recorded = self.read(epoch, known)
        assert recorded is not None, "the record was there a moment ago"
        return recorded

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:06d}.json"

    def _write_once(self, path: Path, text: str) -> None:
        """Make `path` with this content if there is none: it is never seen half written, and never replaced."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(
                f"source {self._source!r}: cannot record the shards of an epoch in {path} ({error}); make room for it, "
                "then start again: the run goes on from its checkpoint"
            ) from error
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if not path.exists():  # over NFS a link can be made and its answer lost
                raise ConfigError(
                    f"followed source {self._source!r}: {path.parent} takes no hard links ({error}), by which one of "
                    "all processes records an epoch; put run.root on a file system that does (NFS and Lustre do)"
                ) from error
        finally:
            temporary.unlink(missing_ok=True)


class ShardFinder:
    """Looks for the shards of one followed source; lists them once, and again where that does not suffice."""

    def __init__(self, config: SourceConfig):
        self._config = config
        self._listing: dict[str, str] | None = None

    def look(self, known: Sequence[ShardHeader]) -> list[ShardHeader]:
        """Headers of the shards that are there and not known, sorted by URL.

        One that is cut may still be on its way: it is left for a later epoch.

        Raises:
            DataError: a known shard is not there any more, or holds something else.
        """
        found = self._list()
        names = {plain_name(shard.url) for shard in known}
        gone = sorted(names - found.keys())
        if gone:
            raise DataError(_gone_message(self._config.name, gone))
        self._check(known, [found[plain_name(shard.url)] for shard in known])
        new = index_shards([found[name] for name in sorted(found.keys() - names)], fields=self._config.fields)
        for shard in new:
            if shard.damage is not None:
                _log.warning(
                    "source %s: shard %s is left for a later epoch, it may still be on its way (%s); move shards into "
                    "place under their name only when they are whole",
                    *(self._config.name, shown(shard.url), shard.damage),
                )
        return [shard for shard in new if shard.damage is None]

    def find_again(self, recorded: Sequence[RecordedShard]) -> list[ShardHeader]:
        """Headers of recorded shards, where they are now: under their URL, else under the same name in another place.

        Raises:
            DataError: a shard is not there any more, or holds something else.
        """
        if not recorded:
            return []
        listed_before = self._listing is not None
        places = _places(recorded, self._listing or self._list())
        if None in places and listed_before:
            places = _places(recorded, self._list())
        gone = [shard.url for shard, place in zip(recorded, places) if place is None]
        if gone:
            raise DataError(_gone_message(self._config.name, gone))
        return self._check(recorded, [place for place in places if place is not None])

    def _list(self) -> dict[str, str]:
        """URLs of all shards there are now, by the URL without its query."""
        self._listing = {plain_name(url): url for url in expand_shards(self._config)}
        return self._listing

    def _check(self, known: Sequence[ShardHeader | RecordedShard], urls: Sequence[str]) -> list[ShardHeader]:
        """Headers of known shards as they are now, which must be as they were."""
        headers = index_shards(urls, fields=self._config.fields)
        for before, now in zip(known, headers, strict=True):
            samples = before.samples if isinstance(before, RecordedShard) else before.num_samples
            if (samples, before.idx) != (now.num_samples, now.idx):
                raise DataError(
                    f"source {self._config.name!r}: shard {shown(now.url)} has changed since the epoch that it was "
                    f"recorded for: it had {samples} samples with index {before.idx}, now {now.num_samples} with "
                    f"{now.idx}; put it back as it was, and give new data new names"
                )
        return headers


def content_digest(shards: Iterable[ShardHeader]) -> str:
    """Hash over shards in order: samples and index of each, neither place nor time, so that a copy has the same."""
    lines = "".join(f"{shard.num_samples} {shard.idx}\n" for shard in shards)
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _places(recorded: Sequence[RecordedShard], listing: Mapping[str, str]) -> list[str | None]:
    """URL of each recorded shard now; None where there is none of its name."""
    by_name: dict[str, list[str]] = {}
    for name in listing:
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    names = (
        shard.url if shard.url in listing else _nearest(shard.url, by_name.get(PurePosixPath(shard.url).name, ()))
        for shard in recorded
    )
    return [None if name is None else listing[name] for name in names]


def _nearest(url: str, candidates: Sequence[str]) -> str | None:
    """Of the places with the same base name, the one that has most folders in common with `url` from its end."""
    parts = PurePosixPath(url).parts[::-1]

    def common(place: str) -> int:
        pairs = zip(parts, PurePosixPath(place).parts[::-1])
        return next((depth for depth, (a, b) in enumerate(pairs) if a != b), len(parts))

    return max(sorted(candidates), key=common, default=None)


def _gone_message(name: str, gone: Sequence[str]) -> str:
    return (
        f"source {name!r}: shard {shown(gone[0])}{f' and {len(gone) - 1} more' if len(gone) > 1 else ''} of an earlier "
        "epoch is not there any more; a followed source may only grow: put it back, or start a new run"
    )
