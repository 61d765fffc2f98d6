"""Writing shards with webdataset's own writer, so that every reader of the format can read them."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig
from trichord.shards.index import index_shards
from trichord.shards.members import is_unsafe, split_name

DEFAULT_SAMPLES_PER_SHARD = 10_000
DEFAULT_MAX_BYTES = 2**30


@dataclass(frozen=True)
class BuildRow:
    """One sample to write: its key, and per extension the bytes or the file that holds them."""

    key: str
    members: dict[str, bytes | Path]


def build_shards(
    rows: Iterable[BuildRow],
    out_dir: str | Path,
    prefix: str = "shard",
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    max_bytes: int = DEFAULT_MAX_BYTES,
    fields: FieldsConfig | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write rows to `out_dir/PREFIX-000000.tar`, ... with their sidecars; the same rows give the same bytes.

    Shards appear under their names only when all of them are whole. A shard is closed at `samples_per_shard` samples,
    or once it holds `max_bytes` bytes of members. `on_progress` is called with the number of samples written.

    Returns:
        Paths of the shards, sorted.

    Raises:
        ConfigError: shards of that prefix are there already.
        DataError: there is no row, a row is malformed, or its file cannot be read.
    """
    out_dir = Path(out_dir)
    taken = sorted(out_dir.glob(f"{prefix}-*.tar"))
    if taken:
        raise ConfigError(f"{taken[0]} is there already; choose another folder or prefix, or delete the old shards")
    partial = out_dir / f".{prefix}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write_tars(_checked(rows), partial, prefix, samples_per_shard, max_bytes, on_progress)
        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            os.replace(partial / name, out_dir / name)
    finally:
        shutil.rmtree(partial)
    paths = [str(out_dir / name) for name in names]
    index_shards(paths, fields=fields)
    return paths


def _write_tars(
    rows: Iterator[BuildRow],
    folder: Path,
    prefix: str,
    samples_per_shard: int,
    max_bytes: int,
    on_progress: Callable[[int], None] | None,
) -> None:
    from webdataset import ShardWriter  # imports torch where it is installed: only when something is written

    first = next(rows, None)
    if first is None:
        raise DataError("there is no sample to write: the table or folder is empty")
    pattern = str(folder.absolute()).replace("%", "%%") + f"/{prefix}-%06d.tar"
    # Fixed owner and time: reproducible bytes, and no PAX header for a fraction of a second.
    options = {"encoder": False, "mtime": 0, "user": "root", "group": "root"}
    with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=max_bytes, verbose=0, **options) as writer:
        for written, row in enumerate(chain([first], rows), start=1):
            writer.write({"__key__": row.key, **{ext: _content(row, ext) for ext in row.members}})
            if on_progress is not None:
                on_progress(written)


def _checked(rows: Iterable[BuildRow]) -> Iterator[BuildRow]:
    """Rows that read back as they are: neighbours with one key would become one sample."""
    previous = None
    for row in rows:
        if not row.members:
            raise DataError(f"sample {row.key!r} has no member; give it an image, an audio clip or a text")
        for ext in row.members:
            if split_name(f"{row.key}.{ext}") != (row.key, ext):
                raise DataError(
                    f"sample key {row.key!r} with extension {ext!r} does not read back: the file name in a key "
                    "must hold no dot and not be empty; rename it, for example with underscores"
                )
            if is_unsafe(ext):
                raise DataError(f"sample {row.key!r}: extension {ext!r} means pickled code, which shards must not hold")
        if row.key == previous:
            raise DataError(f"two samples in a row have the key {row.key!r} and would read back as one; rename one")
        previous = row.key
        yield row


def _content(row: BuildRow, ext: str) -> bytes:
    content = row.members[ext]
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as error:
        raise DataError(f"sample {row.key!r}: cannot read {content} ({error}); check the path") from error
