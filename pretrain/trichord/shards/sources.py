"""From what a config says (paths, globs, brace ranges, URLs) to a list of shards."""

import os
import re
from collections.abc import Iterator

from trichord.core.errors import ConfigError, DataError
from trichord.core.words import some
from trichord.shards.arguments import ArgumentShards
from trichord.shards.config import SourceConfig
from trichord.shards.listing import LIST, OTHER_COMPRESSIONS, looked_in, shards_at
from trichord.shards.locations import is_compressed, is_remote, local_path, plain_name, shown
from trichord.shards.storage import read_whole, with_retries

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_MAX_LIST_BYTES = 1 << 28
_MAX_NAMED = 3


def expand_shards(source: SourceConfig) -> list[str]:
    """All shards of a source: sorted and unique, so that their numbers do not depend on the file system.

    A `.txt` is a list of shards: a path, pattern or URL per line, empty lines and those that start with # left out.

    Braces (`{0000..0099}`, zero-padded as the longer bound; `{train,extra}`) are expanded first, then globs (`*`, `?`,
    `[...]`, `**`). A folder, or a prefix in a bucket, stands for the tars in it, not below it. Local shards are checked
    to exist; remote ones named without a glob are checked when they are read.

    Raises:
        ConfigError: a brace range is malformed, the URL's file system is unknown or not installed, or it is a folder of
            an http server.
        DataError: nothing matches a pattern, a named shard does not exist, it is compressed other than by gzip,
            or a list is empty, or cannot be read.
    """
    shards: set[str] = set()
    who = "" if isinstance(source, ArgumentShards) else f"source {source.name!r}: "
    where = "the argument" if isinstance(source, ArgumentShards) else "shards.sources[].shards"
    for pattern in source.shards:
        for name in _expand(pattern, who, where):
            if plain_name(name).lower().endswith(LIST):
                shards.update(shard for line in _listed(who, name) for shard in _expand(line, who, shown(name)))
            else:
                shards.add(name)
    lists = sorted(shard for shard in shards if plain_name(shard).lower().endswith(LIST))
    if lists:
        raise DataError(f"{who}a list of shards names {shown(lists[0])}, a list; name the shards")
    packed = sorted(shard for shard in shards if plain_name(shard).lower().endswith(OTHER_COMPRESSIONS))
    packed = [shard for shard in packed if not is_compressed(shard)]
    if packed:
        raise DataError(
            f"{who}{shown(packed[0])} is compressed, and samples in it cannot be reached "
            "without reading all before them; of these only .tar.gz and .tgz are unpacked (into the cache): unpack it "
            "once (gunzip, bunzip2, xz -d, zstd -d) and name the .tar"
        )
    return sorted(shards)


def _expand(pattern: str, who: str, where: str) -> list[str]:
    """What one pattern means; at least one shard or list, all local ones there.

    who: begins the messages. where: what is to be corrected if nothing matches.
    """
    urls = list(dict.fromkeys(expand_braces(pattern)))
    found = [shard for url in urls for shard in shards_at(url)]
    if not found:
        raise DataError(
            f"{who}no shard matches {shown(pattern)!r} (looked in {_looked_in(urls)}); check {where}, or build shards "
            "with `trichord data build`"
        )
    missing = [shard for shard in found if not is_remote(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(who + _missing_message(pattern, missing, len(found)))
    return found


def _listed(who: str, url: str) -> list[str]:
    """The lines of a list of shards; relative ones are relative to the list, so that both can be moved together."""
    try:
        text = with_retries(
            lambda: read_whole(url, _MAX_LIST_BYTES), f"reading the list of shards {shown(url)}"
        ).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{who}the list {shown(url)} is not UTF-8 ({error.reason})") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{who}the list {shown(url)} names no shard; write one path or URL per line")
    piped = next((line for line in lines if line.startswith("pipe:")), None)
    if piped is not None:
        raise DataError(f"{who}{shown(url)} names {piped!r}; 'pipe:' runs a shell command and is refused")
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


def _looked_in(urls: list[str]) -> str:
    by_folder = list({os.path.dirname(url): url for url in urls}.values())
    return some([looked_in(url) for url in by_folder], _MAX_NAMED)


def _missing_message(pattern: str, missing: list[str], expected: int) -> str:
    if expected == 1:
        return f"{missing[0]}: no such file; expected a shard, a folder of .tar files, or a list (.txt)"
    named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
    return (
        f"{len(missing)} of {expected} shards named by {pattern!r} do not exist: {named}; correct the range, or copy "
        "the missing shards"
    )
