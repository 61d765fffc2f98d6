"""The bounded cache on this machine's disk, shared by all its processes: fetched blocks and unpacked tar.gz.

No lock is held while anything is fetched or read. A file appears by a rename and disappears by an unlink, so that a
reader has all of it or none, and one that has it open keeps it. Blocks carry checksums: what a crash or a bad disk left
behind is fetched again.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import IO

from trichord.core.log import get_logger
from trichord.shards.patience import settings

_log = get_logger(__name__)
CACHE_VARIABLE = "TRICHORD_CACHE"
_MAGIC = b"TRIBLK1\n"
_CHUNK = 1 << 16  # a member is checked without reading the megabytes around it
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
TOUCH_EVERY_S = 10.0
"""A file that was read is marked as such at most this often: the order of eviction is exact to this."""
_OLD_TEMPORARY_S = 3600.0
_EVICT_TO = 0.9
_EVICT_EVERY = 64
"""A process looks at the whole cache each time it has written this part of the bound."""
_EVICT_WAIT_S = 1.0
_RETRY_DISK_S = 60.0


def cache_root() -> str:
    """`storage.cache_dir`, else $TRICHORD_CACHE, else $XDG_CACHE_HOME/trichord, else ~/.cache/trichord."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return settings().cache_dir or os.environ.get(CACHE_VARIABLE) or os.path.join(home, "trichord")


def cache_bytes() -> int:
    """The bound of the cache."""
    return int(settings().cache_gib * 2**30)


def name_of(*parts: str | int) -> str:
    """A file name for what these parts identify."""
    text = "\n".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=20).hexdigest()


class BlockCache:
    """Blocks of remote objects by name. A disk that cannot be written is reported once and then done without."""

    def __init__(self, root: str | None = None, max_bytes: int | None = None):
        self.root = Path(root or cache_root())
        self.max_bytes = max_bytes or cache_bytes()
        self._unchecked_bytes = self.max_bytes  # the first write looks: a run before may have had a higher bound
        self._off_until = 0.0
        self._told = False

    @property
    def works(self) -> bool:
        """Whether blocks written now will be found again."""
        return time.monotonic() >= self._off_until

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def read(self, name: str, start: int, end: int) -> bytes | None:
        """Bytes `start` to `end` of a block; None where it is not there, or not as it was written."""
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                data = _read_checked(file.fileno(), start, end)
                if data is not None:
                    touch(file.fileno())
                    return data
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("cache block %s cannot be read (%s); fetching it again", path, error)
            return None
        _log.warning("cache block %s is damaged; fetching it again", path)
        _unlink(path)
        return None

    def write(self, name: str, data: bytes) -> None:
        """Keep a block. Never raises: the bytes are at hand, and the cache is only there to save a second fetch."""
        if not self.works:
            return
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_header(data))
                    file.write(data)
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                _unlink(temporary)
                raise
        except OSError as error:
            self._give_up(error)
            return
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes * _EVICT_EVERY >= self.max_bytes:
            self._unchecked_bytes = 0
            evict(self.root, self.max_bytes)

    def _give_up(self, error: OSError) -> None:
        self._off_until = time.monotonic() + _RETRY_DISK_S
        if not self._told:
            self._told = True
            _log.warning(
                "the cache in %s cannot be written (%s); reading goes on without it, each block fetched when needed; "
                "make room there, or set shards.storage.cache_dir",
                self.root,
                error,
            )

    def _path(self, name: str) -> Path:
        return self.root / "blocks" / name[:2] / name


def touch(file: int | str) -> None:
    """Mark a file of the cache as read now. Raises FileNotFoundError where a path has been evicted."""
    now = time.time()
    if not -1.0 < now - os.stat(file).st_mtime < TOUCH_EVERY_S:
        # the modification time, for these files never change: access times are switched off on many disks
        os.utime(file, (now, now))


def evict(root: Path, max_bytes: int) -> None:
    """Remove what was read longest ago until 90 % of the bound are left; processes one after the other."""
    with contextlib.suppress(OSError), open(root / ".evict.lock", "wb") as lock:
        if not _lock_within(lock, _EVICT_WAIT_S):
            return  # whoever has it may be halted; it must not halt us
        files = _files(root)
        total = sum(size for _, size, _ in files)
        if total > max_bytes:
            for _, size, path in sorted(files):
                if total <= _EVICT_TO * max_bytes:
                    break
                _unlink(path)
                total -= size
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile holds the file open, too


def _lock_within(lock: IO[bytes], seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.002)
    return False


def used_bytes(root: Path) -> int:
    """What the bound counts, as it is now."""
    return sum(size for _, size, _ in _files(root))


def _files(root: Path) -> list[tuple[float, int, str]]:
    """(last read, bytes, path) of all that the bound counts; what a killed process left half written is removed."""
    files = []
    for folder in (root / "unpacked", *(root / "blocks").glob("*")):
        with contextlib.suppress(OSError):
            for item in os.scandir(folder):
                with contextlib.suppress(OSError):  # gone meanwhile
                    facts = item.stat(follow_symlinks=False)
                    if item.name.startswith(".new-"):
                        if time.time() - facts.st_mtime > _OLD_TEMPORARY_S:
                            _unlink(item.path)
                    elif not item.name.startswith("."):
                        files.append((facts.st_mtime, facts.st_size, item.path))
    return files


def _header(data: bytes) -> bytes:
    sums = b"".join(_CHECKSUM.pack(zlib.crc32(data[start : start + _CHUNK])) for start in range(0, len(data), _CHUNK))
    return _MAGIC + _LENGTH.pack(len(data)) + sums


def _read_checked(descriptor: int, start: int, end: int) -> bytes | None:
    prefix = os.pread(descriptor, len(_MAGIC) + _LENGTH.size, 0)
    if len(prefix) < len(_MAGIC) + _LENGTH.size or not prefix.startswith(_MAGIC):
        return None
    (length,) = _LENGTH.unpack_from(prefix, len(_MAGIC))
    chunks = -(-length // _CHUNK)
    header_bytes = len(prefix) + _CHECKSUM.size * chunks
    if os.fstat(descriptor).st_size != header_bytes + length or end > length:
        return None
    header = os.pread(descriptor, header_bytes, 0)  # not summed itself: a wrong sum in it fits no chunk
    first, last = start // _CHUNK, -(-end // _CHUNK)
    data = os.pread(descriptor, min(last * _CHUNK, length) - first * _CHUNK, header_bytes + first * _CHUNK)
    view = memoryview(data)
    for chunk in range(first, last):
        piece = view[(chunk - first) * _CHUNK : (chunk - first + 1) * _CHUNK]
        if zlib.crc32(piece) != _CHECKSUM.unpack_from(header, len(prefix) + _CHECKSUM.size * chunk)[0]:
            return None
    return data[start - first * _CHUNK : end - first * _CHUNK]


def _unlink(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
