"""An `.idx` that another tool left beside a shard: read and compared with the tar, never believed.

It cannot spare the walk over the tar. What `.len` holds is in the members (the head of an image, all of a text), whose
headers lie right before them, in the same blocks; and only the walk tells a cut tar, or an `.idx` of another version.
"""

import os
from collections.abc import Sequence
from itertools import zip_longest

from trichord.core.errors import DataError
from trichord.shards import sidecars
from trichord.shards.gathering import GatheredSample
from trichord.shards.locations import is_remote, local_path
from trichord.shards.patience import with_retries
from trichord.shards.storage import read_whole

_WORDS_PER_MEMBER = {"v1.0": 3, "v1.1": 3, "v1.2": 4}  # ext, offset, size; the name came with 1.2
_Line = list[tuple[str, int, int]]


def note_on_idx(url: str, idx: bytes, samples: Sequence[GatheredSample]) -> str | None:
    """What is to be said of the `.idx` beside a shard that is about to be replaced by `idx`.

    None: there is none, it says the same as the tar, or it is our own of an earlier version of the shard.
    """
    place = sidecars.sidecar_places(url)[0]
    if not sidecars.is_writable(place):
        return None
    theirs = _read(place + ".idx")
    if theirs is None or theirs == idx:
        return None
    header = sidecars.read_header(place)
    if header is not None and header.idx == sidecars.digest(theirs):
        return None
    difference = _difference(theirs, samples)
    return difference and f"{difference}; the .idx of another tool is replaced by one of the tar as it is"


def _read(path: str) -> bytes | None:
    try:
        if is_remote(path):
            return with_retries(lambda: read_whole(path, sidecars.MAX_SIDECAR_BYTES), f"looking for {path}")
        with open(local_path(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # `read` makes room for all that it is asked for
            return file.read(min(size, sidecars.MAX_SIDECAR_BYTES))
    except (OSError, DataError):
        return None


def _difference(theirs: bytes, samples: Sequence[GatheredSample]) -> str | None:
    """Where it first differs from the tar, in words; None where it says the same, in whatever version."""
    head, *lines = theirs.decode(errors="surrogateescape").splitlines() or [""]
    version = head.split(" ")[0]
    words = _WORDS_PER_MEMBER.get(version)
    if words is None:
        return f"its first line is {head[:40]!r}, expected v1.0, v1.1 or v1.2 and the number of samples"
    for number, (line, sample) in enumerate(zip_longest(lines, samples), 1):
        if line is None or sample is None:
            return f"it lists {len(lines)} samples, and the tar holds {len(samples)}"
        found, right = _members(line, words), [(ext, ref.offset, ref.size) for ext, ref in sample.members]
        if found != [(sidecars.escaped(ext), offset, size) for ext, offset, size in right]:
            return f"it has {_shown(found)} in sample {number}, the tar {_shown(right)} ({sample.key})"
    return None


def _members(line: str, words: int) -> _Line | None:
    parts = line.split()
    if len(parts) % words:
        return None
    try:
        groups = zip(parts[::words], parts[1::words], parts[2::words])
        return [(ext, int(offset), int(size)) for ext, offset, size in groups]
    except ValueError:
        return None


def _shown(members: _Line | None) -> str:
    if members is None:
        return "a line that cannot be read"
    return ", ".join(f"{ext} of {size} bytes at byte {offset}" for ext, offset, size in members[:2])
