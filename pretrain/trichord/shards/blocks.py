"""Reading remote objects in blocks: from the cache, else by one range request each, with read-ahead."""

import io
import os
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards import remote
from trichord.shards.cache import BlockCache, name_of
from trichord.shards.locations import shown
from trichord.shards.patience import settings, with_retries
from trichord.shards.remote import Facts

_log = get_logger(__name__)
_FILE_BUFFER = 1 << 18
_MAX_QUEUED = 16
_MAX_REMEMBERED = 1024


class BlockReader:
    """The blocks of one process. Threads may share it; a forked child makes its own (see `block_reader`)."""

    def __init__(self):
        config = settings()
        self._block_bytes = max(1, int(config.block_mib * 2**20))
        self._timeout_s, self._ahead = config.timeout_s, config.read_ahead_blocks
        self._cache = BlockCache()
        self._lock = threading.Lock()  # guards the next three; nothing waits for the storage while it is held
        self._fetching: dict[str, Future[bytes]] = {}
        self._recent: OrderedDict[str, bytes] = OrderedDict()  # what a cache that cannot be written would have kept
        self._looked_ahead: OrderedDict[str, None] = OrderedDict()
        self._queue: queue.Queue[tuple[str, Facts, int]] = queue.Queue(_MAX_QUEUED)
        self._thread: threading.Thread | None = None

    def read(self, url: str, facts: Facts, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the version of the object that `facts` names; fewer where it ends before.

        Raises:
            DataError: the object changed, is gone or refused, or its storage still failed after `storage.attempts`.
        """
        end = min(offset + size, facts.size)
        if not 0 <= offset < end:
            return b""
        pieces = []
        last = (end - 1) // self._block_bytes
        for number in range(offset // self._block_bytes, last + 1):
            start = number * self._block_bytes
            pieces.append(self._piece(url, facts, number, max(offset - start, 0), min(end - start, self._block_bytes)))
        self._look_ahead(url, facts, last)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, url: str, facts: Facts, number: int, start: int, end: int) -> bytes:
        name = self._name(url, facts, number)
        data = self._cache.read(name, start, end)
        if data is not None:
            return data
        with self._lock:
            block = self._recent.get(name)
            waiting = self._fetching.get(name)
        if block is None and waiting is not None:
            block = _result(waiting)
        if block is None:
            what = f"reading block {number} of shard {shown(url)}"
            block = with_retries(lambda: self._fetch(name, url, facts, number), what)
        return block[start:end]

    def _fetch(self, name: str, url: str, facts: Facts, number: int) -> bytes:
        """One request for one block, which others who want the same meanwhile wait for."""
        future: Future[bytes] = Future()
        with self._lock:
            self._fetching[name] = future
        try:
            start = number * self._block_bytes
            data, _ = remote.fetch(url, start, min(start + self._block_bytes, facts.size), facts, self._timeout_s)
            self._cache.write(name, data)
            if not self._cache.works:
                self._remember(name, data)
            future.set_result(data)
            return data
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                if self._fetching.get(name) is future:
                    del self._fetching[name]

    def _remember(self, name: str, data: bytes) -> None:
        with self._lock:
            self._recent[name] = data
            while len(self._recent) > 2 + self._ahead:
                self._recent.popitem(last=False)

    def _look_ahead(self, url: str, facts: Facts, number: int) -> None:
        """Have the blocks after `number` fetched in the background; where it has enough to do, they are not."""
        last = (facts.size - 1) // self._block_bytes
        for following in range(number + 1, min(number + self._ahead, last) + 1):
            name = self._name(url, facts, following)
            with self._lock:
                if name in self._looked_ahead:
                    continue
                self._looked_ahead[name] = None
                if len(self._looked_ahead) > _MAX_REMEMBERED:
                    self._looked_ahead.popitem(last=False)
            try:
                self._queue.put_nowait((url, facts, following))
            except queue.Full:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_ahead, daemon=True, name="shard-read-ahead")
                self._thread.start()

    def _run_ahead(self) -> None:
        while True:
            url, facts, number = self._queue.get()
            name = self._name(url, facts, number)
            with self._lock:
                known = name in self._fetching or name in self._recent
            if known or self._cache.has(name):
                continue
            try:
                self._fetch(name, url, facts, number)
            except Exception as error:  # whoever needs the block asks again, with patience, and says what is wrong
                _log.debug("read-ahead of block %d of shard %s: %s", number, shown(url), error)

    def _name(self, url: str, facts: Facts, number: int) -> str:
        return name_of(url, facts.size, facts.etag, self._block_bytes, number)


def _result(waiting: Future[bytes]) -> bytes | None:
    try:
        return waiting.result()
    except DataError:
        raise
    except Exception:
        return None  # it was another's try; ours follows


class RemoteFile(io.RawIOBase):
    """An object as a seekable file, read through the blocks."""

    def __init__(self, url: str, facts: Facts):
        self._url, self._facts, self._position = url, facts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._facts.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        data = block_reader().read(self._url, self._facts, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_blocks(url: str, facts: Facts) -> io.BufferedReader:
    return io.BufferedReader(RemoteFile(url, facts), _FILE_BUFFER)


_reader: BlockReader | None = None


def block_reader() -> BlockReader:
    """The reader of this process."""
    global _reader
    if _reader is None:
        _reader = BlockReader()
    return _reader


def forget_reader() -> None:
    """The next read makes a new reader: settings changed, or this is a child without its parent's threads."""
    global _reader
    _reader = None


os.register_at_fork(after_in_child=forget_reader)
