"""From what a config says (paths, globs, brace ranges, URLs) to a list of shards."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

from trichord.core.errors import ConfigError, DataError
from trichord.shards import remote
from trichord.shards.config import SourceConfig
from trichord.shards.locations import COMPRESSED, filesystem, is_compressed, is_remote, local_path, plain_name, shown
from trichord.shards.patience import settings
from trichord.shards.storage import read_whole, with_retries

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_MAGIC = re.compile(r"[*?\[]")
_UNREADABLE = (".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz")
_TARS = (".tar", *COMPRESSED)
_LIST = ".txt"
_LIST_PATIENCE = 10  # a glob is many requests
_MAX_LIST_BYTES = 1 << 28
_MAX_NAMED = 3


def expand_shards(source: SourceConfig) -> list[str]:
    """All shards of a source: sorted and unique, so that their numbers do not depend on the file system.

    A `.txt` is a list of shards: a path, pattern or URL per line, empty lines and those that start with # left out.

    Braces (`{0000..0099}`, zero-padded as the longer bound; `{train,extra}`) are expanded first, then globs (`*`, `?`,
    `[...]`, `**`). A local folder stands for the tars in it, not below it. Local shards are checked to exist; remote
    ones named without a glob are checked when they are read.

    Raises:
        ConfigError: a brace range is malformed, or the URL's file system is unknown or not installed.
        DataError: nothing matches a pattern, a named shard does not exist, it is compressed other than by gzip,
            or a list is empty, or cannot be read.
    """
    shards: set[str] = set()
    for pattern in source.shards:
        found = _expand(source.name, pattern)
        for name in found:
            if plain_name(name).lower().endswith(_LIST):
                shards.update(shard for line in _listed(source.name, name) for shard in _expand(source.name, line))
            else:
                shards.add(name)
    lists = sorted(shard for shard in shards if plain_name(shard).lower().endswith(_LIST))
    if lists:
        raise DataError(f"source {source.name!r}: a list of shards names {shown(lists[0])}, a list; name the shards")
    packed = sorted(shard for shard in shards if plain_name(shard).lower().endswith(_UNREADABLE))
    packed = [shard for shard in packed if not is_compressed(shard)]
    if packed:
        raise DataError(
            f"source {source.name!r}: {shown(packed[0])} is compressed, and samples in it cannot be reached "
            "without reading all before them; of these only .tar.gz and .tgz are unpacked (into the cache): unpack it "
            "once (gunzip, bunzip2, xz -d, zstd -d) and name the .tar"
        )
    return sorted(shards)


def _expand(name: str, pattern: str) -> list[str]:
    """What one pattern of a source means; at least one shard or list, all local ones there."""
    urls = list(dict.fromkeys(expand_braces(pattern)))
    found = [shard for url in urls for shard in _resolve(url)]
    if not found:
        raise DataError(
            f"source {name!r}: no shard matches {pattern!r} (looked in {_looked_in(urls)}); "
            "check shards.sources[].shards, or build shards with `trichord data build`"
        )
    missing = [shard for shard in found if not is_remote(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(_missing_message(name, pattern, missing, len(found)))
    return found


def _listed(name: str, url: str) -> list[str]:
    """The lines of a list of shards; relative ones are relative to the list, so that both can be moved together."""
    try:
        text = with_retries(
            lambda: read_whole(url, _MAX_LIST_BYTES), f"reading the list of shards {shown(url)}"
        ).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"source {name!r}: the list {shown(url)} is not UTF-8 ({error.reason})") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"source {name!r}: the list {shown(url)} names no shard; write one path or URL per line")
    piped = next((line for line in lines if line.startswith("pipe:")), None)
    if piped is not None:
        raise DataError(f"source {name!r}: {shown(url)} names {piped!r}; 'pipe:' runs a shell command and is refused")
    base = plain_name(url).rpartition("/")[0] if is_remote(url) else os.path.dirname(local_path(url))
    return [_beside(base, line) for line in lines]


def _beside(base: str, line: str) -> str:
    if line.startswith(("/", "file://")) or is_remote(line):
        return line
    return f"{base}/{line}" if is_remote(base) else os.path.join(base, line)


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{0..2}b` -> a0b, a1b, a2b; `{x,y}` -> x, y; nested and repeated braces multiply.

    Raises:
        ConfigError: a brace that is neither a range of integers nor a list, or one that is not closed.
    """
    match = _BRACES.search(pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise ConfigError(f"shard pattern {pattern!r} has an unmatched brace; write {{0000..0099}} or {{a,b}}")
        yield pattern
        return
    for choice in _choices(match.group(1), pattern):
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(body: str, pattern: str) -> list[str]:
    bounds = _RANGE.match(body)
    if bounds is None:
        if "," not in body:
            raise ConfigError(
                f"shard pattern {pattern!r}: {{{body}}} is neither a range {{0000..0099}} nor a list {{a,b}}"
            )
        return body.split(",")
    first, last = (int(bound) for bound in bounds.groups())
    padded = any(bound.lstrip("-").startswith("0") and len(bound.lstrip("-")) > 1 for bound in bounds.groups())
    width = max(len(bound) for bound in bounds.groups()) if padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _resolve(url: str) -> list[str]:
    """Shards behind one brace-free URL: itself, or what its glob matches."""
    if is_remote(url):
        return _remote_glob(url) if _MAGIC.search(url) else [url]
    path = local_path(url)
    if os.path.isdir(path):
        return _tars_in(path)
    if os.path.exists(path) or not _MAGIC.search(path):
        return [path]
    return [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]


def _tars_in(folder: str) -> list[str]:
    found = [os.path.join(folder, name) for name in os.listdir(folder) if name.lower().endswith(_TARS)]
    if not found:
        raise DataError(f"{folder}: expected a folder that holds .tar files, and it holds none")
    return found


def _remote_glob(url: str) -> list[str]:
    fs, path = filesystem(url)

    def ask() -> list[str]:
        fs.invalidate_cache()  # a source that grows is listed again
        return remote.call(url, "glob", path, timeout_s=settings().timeout_s * _LIST_PATIENCE)

    return [fs.unstrip_protocol(match) for match in with_retries(ask, f"listing {shown(url)}")]


def _looked_in(urls: list[str]) -> str:
    folders = list(dict.fromkeys(os.path.dirname(url) or "." for url in urls))
    named = ", ".join(
        folder if is_remote(folder) or os.path.isdir(folder) else f"{folder} (no such folder)"
        for folder in itertools.islice(folders, _MAX_NAMED)
    )
    return named + (f" and {len(folders) - _MAX_NAMED} more" if len(folders) > _MAX_NAMED else "")


def _missing_message(name: str, pattern: str, missing: list[str], expected: int) -> str:
    named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
    return (
        f"source {name!r}: {len(missing)} of {expected} shards named by {pattern!r} do not exist: {named}; "
        "correct the range, or copy the missing shards"
    )
