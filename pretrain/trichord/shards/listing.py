"""What folders and patterns hold, on this machine's disks and in buckets."""

import glob
import os
import re
from typing import Any

from trichord.core.errors import ConfigError, DataError
from trichord.shards import remote
from trichord.shards.locations import COMPRESSED, filesystem, is_remote, local_path, plain_name, scheme, shown
from trichord.shards.patience import settings, with_retries

TARS = (".tar", *COMPRESSED)
LIST = ".txt"
OTHER_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz")
_FILES = (*TARS, LIST, *OTHER_COMPRESSIONS)
_MAGIC = re.compile(r"[*?\[]")
_PATIENCE = 10  # a listing is many requests
_UNLISTED = (
    "http servers do not say what they hold; name the shards with braces (shard-{0000..0099}.tar) or in a list (.txt, "
    "one per line)"
)


def shards_at(url: str) -> list[str]:
    """Shards behind one brace-free URL: itself, what its glob matches, or the tars in the folder that it is.

    Raises:
        ConfigError: a folder of an http server. DataError: a folder without tars, or a storage that cannot be listed.
    """
    if is_remote(url):
        return _remote_shards(url)
    path = local_path(url)
    if os.path.isdir(path):
        return _tars([os.path.join(path, name) for name in os.listdir(path)], path)
    if os.path.exists(path) or not _MAGIC.search(path):
        return [path]
    return [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]


def looked_in(url: str) -> str:
    """The folder that a pattern without a match was looked for in, as messages name it: with what is missing of it."""
    folder = os.path.dirname(url) or "."
    if not is_remote(url):
        return folder if os.path.isdir(folder) else f"{folder} (no such folder)"
    if scheme(url) in ("http", "https"):
        return f"{shown(folder)}; {_UNLISTED}"
    missing = remote.missing_bucket(url, settings().timeout_s)
    return f"{folder} ({missing})" if missing else folder


def _remote_shards(url: str) -> list[str]:
    name = plain_name(url)  # a `?` begins the query of an http address, and is no pattern
    if _MAGIC.search(name):
        fs, path = filesystem(url)
        return [fs.unstrip_protocol(match) for match in _ask(url, "glob", path) or ()]
    if name.lower().endswith(_FILES):
        return [url]
    if scheme(url) in ("http", "https"):
        if name.endswith("/"):
            raise ConfigError(f"{shown(url)}: expected a shard, got a folder; {_UNLISTED}")
        return [url]
    return _remote_folder(url)


def _remote_folder(url: str) -> list[str]:
    fs, path = filesystem(url)
    entries = _ask(url, "ls", path, detail=True)
    if entries is None:
        missing = remote.missing_bucket(url, settings().timeout_s) or f"there is no {shown(url)}"
        raise DataError(f"{missing}; expected a shard, or a folder that holds .tar files")
    files = [entry["name"] for entry in entries if entry["type"] == "file"]
    if [name.strip("/") for name in files] == [path.strip("/")]:
        return [url]  # an object whose name does not say that it is a tar
    return _tars([fs.unstrip_protocol(name) for name in files], url)


def _tars(names: list[str], folder: str) -> list[str]:
    found = [name for name in names if name.lower().endswith(TARS)]
    if not found:
        raise DataError(f"{folder}: expected a folder that holds .tar files, and it holds none")
    return found


def _ask(url: str, method: str, path: str, **options: Any) -> Any:
    """A listing as it is now; None where there is no such thing."""
    fs, _ = filesystem(url)

    def ask() -> Any:
        fs.invalidate_cache()  # a source that grows is listed again
        try:
            return remote.call(url, method, path, timeout_s=settings().timeout_s * _PATIENCE, **options)
        except FileNotFoundError:
            return None

    return with_retries(ask, f"listing {shown(url)}")
