"""Bytes of shards, wherever they are: local files by position, remote ones in cached blocks, tar.gz unpacked."""

import io
import os
import threading
import time
from collections import OrderedDict
from typing import IO

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards import blocks, remote
from trichord.shards.config import StorageConfig
from trichord.shards.locations import is_compressed, is_remote, local_path, shown
from trichord.shards.patience import set_settings, settings, with_retries
from trichord.shards.remote import Facts
from trichord.shards.unpack import unpacked_path

__all__ = ["configure_storage", "open_shard", "read_range", "read_whole", "shard_identity", "with_retries"]

_log = get_logger(__name__)
MAX_OPEN_FILES = 64
_LOOK_AT_UNPACKED_S = 10.0
_EVICTIONS = 3
_known: dict[str, dict[str, int | str]] = {}
"""The version of each remote or packed shard that this process reads: what `shard_identity` found last."""
_unpacked: dict[str, tuple[str, float]] = {}
"""Path of a tar.gz's unpacked copy, and when it was last seen there."""


def configure_storage(config: StorageConfig) -> None:
    """Set patience, blocks and cache of this process; forked children inherit them, spawned ones must be told."""
    set_settings(config)
    blocks.forget_reader()
    _unpacked.clear()


def shard_identity(url: str) -> dict[str, int | str]:
    """What tells one version of a shard from another: size and mtime, or for remote ones size and etag (or time).

    From now on this process reads remote shards in this version only: if it is replaced, reading raises DataError.

    Raises:
        DataError: the shard cannot be found or may not be read.
    """
    if is_remote(url):
        facts = with_retries(lambda: remote.ask_facts(url, settings().timeout_s), f"looking at shard {shown(url)}")
        found: dict[str, int | str] = {"size": facts.size, "etag": facts.etag}
        if not facts.etag and _known.get(url) != found:
            _log.warning("%s has neither etag nor time: a change that keeps its size goes unnoticed", shown(url))
    else:
        stat = with_retries(lambda: os.stat(local_path(url)), f"looking at shard {url}")
        found = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if not is_compressed(url):
            return found
    if _known.get(url) != found:
        _unpacked.pop(url, None)
        _known[url] = found
    return found


def open_shard(url: str) -> IO[bytes]:
    """A seekable file of a whole shard (of a tar.gz: unpacked), for reading it from front to back."""
    if is_compressed(url):
        return os.fdopen(os.dup(_open_files.get(_unpacked_file(url)).fileno()), "rb")  # open: cannot be evicted
    return _open_as_is(url)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`; fewer if the file ends before. Wrap it in `with_retries`.

    Raises:
        OSError: a local disk failed. DataError: a remote storage failed after its own retries, or the shard changed.
    """
    if is_compressed(url):
        path = _unpacked_file(url)
    elif is_remote(url):
        return blocks.block_reader().read(url, _facts(url), offset, size)
    else:
        path = local_path(url)
    try:
        return _pread(_open_files.get(path).fileno(), offset, size)
    except OSError:
        _open_files.drop(path)  # a stale handle (ESTALE on NFS) must not outlive the retry
        raise


def read_whole(url: str, max_bytes: int) -> bytes:
    """A small file (a sidecar, a list of shards) in its present version, past the cache. Wrap it in `with_retries`.

    Raises:
        OSError: the storage failed. DataError: the file is larger than `max_bytes`, or changed meanwhile.
    """
    if not is_remote(url):
        with open(local_path(url), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, max_bytes) + 1)  # it sets aside what is asked for, whatever the file holds
    else:
        timeout_s, step = settings().timeout_s, 1 << 23
        data, facts = remote.fetch(url, 0, step, None, timeout_s)
        while len(data) < min(facts.size, max_bytes + 1):
            data += remote.fetch(url, len(data), len(data) + step, facts, timeout_s)[0]
    if len(data) > max_bytes:
        raise DataError(f"{shown(url)} has more than {max_bytes} bytes; is it what it should be?")
    return data


def _open_as_is(url: str) -> IO[bytes]:
    if is_remote(url):
        return blocks.open_blocks(url, _facts(url))
    return open(local_path(url), "rb")


def _identity(url: str) -> dict[str, int | str]:
    return _known.get(url) or shard_identity(url)


def _facts(url: str) -> Facts:
    identity = _identity(url)
    return Facts(int(identity["size"]), str(identity["etag"]))


def _unpacked_file(url: str) -> str:
    """Path of the unpacked copy, there a moment ago: it is looked for, and marked as read, every 10 s."""
    path, seen = _unpacked.get(url, ("", 0.0))
    if path in _open_files and time.monotonic() - seen < _LOOK_AT_UNPACKED_S:
        return path
    for attempt in range(1, _EVICTIONS + 1):
        found = unpacked_path(url, _identity(url), lambda: _open_as_is(url))
        _open_files.drop(found)  # it may have been evicted and made anew: the old one, open, would hold its disk space
        try:
            _open_files.get(found)
        except FileNotFoundError:  # evicted between the two lines
            if attempt == _EVICTIONS:
                raise
        else:
            break
    _unpacked[url] = found, time.monotonic()
    return found


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """os.pread may return less than asked for without being at the end (Linux: at most 2 GiB at once)."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class _OpenFiles(threading.local):
    """A bounded set of open files, one set per thread: none can be closed by one thread and read by another.

    `os.pread` has no position, so a forked child may go on with its parent's descriptors.
    """

    def __init__(self):
        self._files: OrderedDict[str, io.FileIO] = OrderedDict()

    def get(self, path: str) -> io.FileIO:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = io.FileIO(path)
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(path)
        return file

    def drop(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            file.close()

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def __len__(self) -> int:
        return len(self._files)


_open_files = _OpenFiles()
