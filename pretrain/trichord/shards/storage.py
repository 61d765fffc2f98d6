"""Bytes of shards, wherever they are: local files by position, everything else by fsspec range reads, with retries."""

import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, TypeVar

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.sources import filesystem, is_remote, local_path

_log = get_logger(__name__)
Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_DELAY_S = 0.2
MAX_OPEN_FILES = 64
# What waiting does not mend.
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def with_retries(action: Callable[[], Result], what: str) -> Result:
    """Run `action`; on an I/O error try again, `ATTEMPTS` times in all, waiting 0.2 s, then twice as long each time.

    Raises:
        DataError: it failed every time, or in a way that waiting does not mend. `what` says what was being done.
    """
    delay_s = FIRST_DELAY_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except _FINAL_ERRORS as error:
            raise DataError(f"{what}: {error}; check that the shard is there and readable") from error
        except OSError as error:
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{what}: failed {ATTEMPTS} times, last with {type(error).__name__}: {error}; "
                    "check the storage, then start again: the run goes on from its checkpoint"
                ) from error
            _log.warning("%s: %s; try %d of %d follows in %.1f s", what, error, attempt + 1, ATTEMPTS, delay_s)
            time.sleep(delay_s)
            delay_s *= 2
    raise AssertionError("unreachable")


def shard_identity(url: str) -> dict[str, int | str]:
    """What tells one version of a shard from another: size and mtime, or for remote ones size and etag.

    Raises:
        DataError: the shard cannot be found.
    """
    if not is_remote(url):
        facts = with_retries(lambda: os.stat(local_path(url)), f"looking at shard {url}")
        return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}

    def ask() -> dict[str, Any]:
        fs, path = filesystem(url)
        return fs.info(path)

    info = with_retries(ask, f"looking at shard {url}")
    version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return {"size": int(info["size"]), "etag": str(version)}


def open_shard(url: str) -> IO[bytes]:
    """A seekable file of a whole shard, for reading it from front to back."""
    if not is_remote(url):
        return open(local_path(url), "rb")
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`; fewer if the file ends before. Raises OSError; wrap it in `with_retries`."""
    if is_remote(url):
        fs, path = filesystem(url)
        return fs.cat_file(path, start=offset, end=offset + size)
    path = local_path(url)
    try:
        return _pread(_open_files.get(path).fileno(), offset, size)
    except OSError:
        _open_files.drop(path)  # a stale handle (ESTALE on NFS) must not outlive the retry
        raise


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

    def __len__(self) -> int:
        return len(self._files)


_open_files = _OpenFiles()
