"""From what a config says (paths, globs, brace ranges, URLs) to a list of shards."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec.core

from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import SourceConfig

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_MAGIC = re.compile(r"[*?\[]")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_MAX_NAMED = 3


def is_remote(url: str) -> bool:
    """Whether the URL is read through fsspec (`s3://`, `https://`, chained ones) and not from this disk."""
    return _SCHEME.match(url) is not None and not url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. fsspec keeps one instance per process, also after a fork.

    Raises:
        ConfigError: nothing goes by this scheme, or what does is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"shards at {url!r} need a file system that is not installed ({error}); install it, for S3 with "
            "`pip install 'trichord[s3]'`"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"shards at {url!r}: {error}; expected a path, file://, s3://, gs://, https:// or another scheme of fsspec"
        ) from error


def expand_shards(source: SourceConfig) -> list[str]:
    """All shards of a source: sorted and unique, so that their numbers do not depend on the file system.

    Braces (`{0000..0099}`, zero-padded as the longer bound; `{train,extra}`) are expanded first, then globs (`*`, `?`,
    `[...]`, `**`). Local shards are checked to exist; remote ones named without a glob are checked when they are read.

    Raises:
        ConfigError: a brace range is malformed, or the URL's file system is unknown or not installed.
        DataError: nothing matches a pattern, a named shard does not exist, or it is compressed.
    """
    shards: set[str] = set()
    for pattern in source.shards:
        urls = list(dict.fromkeys(expand_braces(pattern)))
        found = [shard for url in urls for shard in _resolve(url)]
        if not found:
            raise DataError(
                f"source {source.name!r}: no shard matches {pattern!r} (looked in {_looked_in(urls)}); "
                "check shards.sources[].shards, or build shards with `trichord data build`"
            )
        missing = [shard for shard in found if not is_remote(shard) and not os.path.isfile(shard)]
        if missing:
            raise DataError(_missing_message(source.name, pattern, missing, len(found)))
        shards.update(found)
    compressed = sorted(shard for shard in shards if shard.endswith(_COMPRESSED))
    if compressed:
        raise DataError(
            f"source {source.name!r}: {compressed[0]} is compressed, and samples in a compressed tar cannot be reached "
            "without reading all before them; unpack it once (gunzip, xz -d, zstd -d) and name the .tar"
        )
    return sorted(shards)


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
        raise DataError(f"{path} is a folder; name the tars in it, for example {os.path.join(path, '*.tar')}")
    if os.path.exists(path) or not _MAGIC.search(path):
        return [path]
    return [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]


def _remote_glob(url: str) -> list[str]:
    fs, path = filesystem(url)
    try:
        return [fs.unstrip_protocol(match) for match in fs.glob(path)]
    except OSError as error:
        raise DataError(f"cannot list {url!r}: {error}; check the address and your credentials") from error


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
