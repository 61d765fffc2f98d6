"""The texts that a tokenizer is trained on: of text files, and of shards, chats and documents in them included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trichord.building.lines import MAX_LINE_BYTES, read_lines
from trichord.building.rows import BadRow
from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.arguments import argument_shards, refuse_pipes
from trichord.shards.config import ShardsConfig
from trichord.shards.entries import SampleEntry
from trichord.shards.listing import LIST, TARS
from trichord.shards.locations import is_remote, local_path, plain_name, shown
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import open_sources, read_member
from trichord.shards.storage import read_whole, with_retries

_log = get_logger(__name__)
_PATTERN = frozenset("*?[{")


def texts_of(sources: Sequence[str]) -> Iterator[str]:
    """The lines of text files, then the texts of all samples of the shards.

    Args:
        sources: text files (`.gz` too); shards, patterns and folders of them, URLs; a `.txt` in which every line names
            a tar or a URL is a list of shards, as elsewhere.

    Raises:
        ConfigError: a source is a shell command. DataError: a source is not there, or neither text nor shards.
    """
    refuse_pipes(sources)
    shards = [source for source in sources if _names_shards(source)]
    for source in sources:
        if source not in shards:
            yield from _lines(source)
    if shards:
        yield from _texts_of_shards(shards)


def texts_in_json(meta: Mapping[str, Any]) -> Iterator[str]:
    """What a model reads of a json member: the texts of its `messages`, and its `prompt`."""
    messages = meta.get("messages")
    contents = (
        [turn.get("content") for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    )
    for content in contents:
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        yield from (text for text in texts if isinstance(text, str))
    if isinstance(meta.get("prompt"), str):
        yield meta["prompt"]


def _names_shards(source: str) -> bool:
    name = plain_name(source).lower()
    if name.endswith(LIST) and (is_remote(source) or Path(local_path(source)).is_file()):
        return _is_list(_lines(source))
    path = Path(local_path(source))
    return name.endswith(TARS) or is_remote(source) or path.is_dir() or (not path.exists() and bool(_PATTERN & {*name}))


def _is_list(lines: Iterable[str]) -> bool:
    """Whether there are lines, and each names a tar or a URL; the first that does not ends the look."""
    named = False
    for line in (line.strip() for line in lines):
        if line and not line.startswith("#"):
            named = True
            if not is_remote(line) and not plain_name(line).lower().endswith(TARS):
                return False
    return named


def _lines(source: str) -> Iterator[str]:
    if is_remote(source):
        data = with_retries(lambda: read_whole(source, MAX_LINE_BYTES), f"reading {shown(source)}")
        yield from data.decode(errors="replace").splitlines()
        return
    path = Path(local_path(source))
    if not path.is_file():
        raise DataError(f"{source}: no such file; expected a text file, or shards (*.tar, a folder or a list of them)")
    for _, line in read_lines(path):
        if isinstance(line, BadRow):
            raise DataError(f"{line.origin}: {line.reason}; expected a UTF-8 text file, or shards named *.tar")
        yield line


def _texts_of_shards(shards: list[str]) -> Iterator[str]:
    unread = 0
    for table in open_sources(ShardsConfig(sources=(argument_shards(shards),))):
        for entry in map(table.entry, range(table.num_samples)):
            try:
                yield from _texts_of_sample(entry)
            except (BadSample, ValueError, RecursionError):
                unread += 1
    if unread:
        _log.warning("%d samples have a text or json that cannot be read; `trichord data lint` names them", unread)


def _texts_of_sample(entry: SampleEntry) -> Iterator[str]:
    if entry.problem is not None:
        return
    if "text" in entry.members:
        yield read_member(entry, "text", MAX_LINE_BYTES).decode(errors="replace")
    if "meta" in entry.members:
        meta = json.loads(read_member(entry, "meta", MAX_LINE_BYTES))
        yield from texts_in_json(meta if isinstance(meta, dict) else {})
