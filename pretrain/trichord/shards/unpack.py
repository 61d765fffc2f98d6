"""tar.gz shards: unpacked once into the cache, for no sample behind the first can be reached in the packed file."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.cache import cache_bytes, cache_root, evict, name_of, touch, used_bytes
from trichord.shards.locations import shown
from trichord.shards.patience import settings

_log = get_logger(__name__)
_PACKED = 1 << 16
_PIECE = 1 << 20
_LOOK_EVERY = 64 << 20
_FREE_FRAC = 0.9
_POLL_S = 0.1
_told: set[str] = set()


def unpacked_path(url: str, identity: dict[str, int | str], open_packed: Callable[[], IO[bytes]]) -> str:
    """Path of the unpacked shard in the cache, unpacked first where it is not there.

    Several processes may ask at once: one unpacks, the others wait for it, and do it themselves if it takes too long.
    The path may be evicted at any time after the call; who has it open keeps it.

    Raises:
        DataError: it unpacks to more than the cache or the disk takes, is no gzip file, or the cache cannot be written.
    """
    folder = Path(cache_root()) / "unpacked"
    path = str(folder / (name_of(url, *identity.values()) + ".tar"))
    if _is_there(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path):
            if not _is_there(path):
                _unpack(url, path, open_packed)
    except OSError as error:
        raise DataError(
            f"shard {shown(url)} cannot be unpacked into the cache in {folder} ({error}); set shards.storage.cache_dir "
            "to a folder with room that can be written, or unpack the shard and name the .tar"
        ) from error
    return path


def _is_there(path: str) -> bool:
    try:
        touch(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """A lock that ends with its process. Where it cannot be had in time, or at all, two may unpack, each its own."""
    give_up = time.monotonic() + 60 * settings().timeout_s
    with open(f"{path}.lock", "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    break
                time.sleep(_POLL_S)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.lock")
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile holds the file open, too


def _unpack(url: str, path: str, open_packed: Callable[[], IO[bytes]]) -> None:
    folder = os.path.dirname(path)
    root = Path(folder).parent
    limit = min(cache_bytes(), int(_FREE_FRAC * (shutil.disk_usage(folder).free + used_bytes(root))))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as target, open_packed() as packed:
            written, looked_at = 0, 0
            for piece in _inflate(packed, url):
                written += len(piece)
                if written > limit:
                    raise DataError(
                        f"shard {shown(url)} unpacks to more than {limit} bytes, which is all that shards.storage."
                        f"cache_gib ({settings().cache_gib:g}) and the free disk under {folder} allow; raise it, "
                        "set shards.storage.cache_dir to a larger disk, or unpack the shard and name the .tar"
                    )
                target.write(piece)
                if written - looked_at >= _LOOK_EVERY:
                    looked_at = written
                    evict(root, max(0, cache_bytes() - written - _LOOK_EVERY))
            target.flush()
            os.fsync(target.fileno())  # unlike blocks, this file carries no checksums
        evict(root, cache_bytes() - written)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _warn_if_again(url, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _inflate(packed: IO[bytes], url: str) -> Iterator[bytes]:
    """What a gzip file (of one or more members) holds. One that breaks off gives what is whole, as a cut tar does: the
    walk over the tar then says where it ends.

    Raises:
        DataError: it is no gzip file, or damaged.
    """
    engine, data, before = zlib.decompressobj(wbits=31), b"", 0
    while True:
        if not data and not (data := packed.read(_PACKED)):
            if rest := engine.flush():  # the last of what `_PIECE` held back
                yield rest
            if before and not engine.eof:
                _log.warning("shard %s: the gzip stream is cut; its first %d bytes are used", shown(url), before)
            return
        if engine.eof:
            if not data.strip(b"\0"):  # padding up to a block
                data = b""
                continue
            engine = zlib.decompressobj(wbits=31)
        try:
            piece = engine.decompress(data, _PIECE)
        except zlib.error as error:
            # not only what follows: gzip's one checksum is at its end, and what came before may be wrong as well
            raise DataError(
                f"shard {shown(url)} is no whole gzip file ({error}, after {before} unpacked bytes); was something "
                "else saved under its name? Copy or pack it anew, or leave it out"
            ) from error
        data = engine.unconsumed_tail or engine.unused_data
        before += len(piece)
        if piece:
            yield piece


def _warn_if_again(url: str, path: str) -> None:
    """A shard unpacked twice by one process was evicted in between: the cache is too small for the run."""
    if path in _told:
        _log.warning(
            "shard %s had to be unpacked again: the cache of %g GiB in %s is too small for the shards in use; raise "
            "shards.storage.cache_gib, or unpack the shards for good",
            shown(url),
            settings().cache_gib,
            os.path.dirname(path),
        )
    _told.add(path)
