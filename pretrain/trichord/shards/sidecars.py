"""The two small files beside each shard, their formats and their places.

`.idx`: the members of each sample, in the text format v1.2 of NVIDIA DALI's `wds2idx`, so that both tools share it:

    v1.2 <samples>
    <ext> <offset> <size> <name> [<ext> <offset> <size> <name> ...]      one line per sample

The text is that of `wds2idx`, byte for byte, on tars without PAX headers; on those with them (float mtimes, as
`webdataset.ShardWriter` writes by default) its offsets are some blocks too high, and these are right.

`.len`: JSON lines. The first says which version of the shard it describes and what the columns are; then one array per
sample with, per column, null (no such member), the member's measure (see `probes`), or a string: why it has none.
An object at the end of an array holds what does not fit the columns: `problem` of the whole sample, exact `names`,
`numbered` (by extension and kind) for members such as `0.jpg`, which only the last part of their extension maps.
"""

import hashlib
import json
import os
import tempfile
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards import remote
from trichord.shards.cache import CACHE_VARIABLE, cache_root
from trichord.shards.locations import (
    COMPRESSED,
    filesystem,
    is_compressed,
    is_remote,
    local_path,
    plain_name,
    scheme,
    shown,
)
from trichord.shards.members import MemberRef
from trichord.shards.patience import settings, with_retries
from trichord.shards.storage import read_whole

_log = get_logger(__name__)
LEN_FORMAT = "trichord-len"
LEN_VERSION = 2
IDX_VERSION = "v1.2"
_MAX_HEADER_BYTES = 1 << 20
_MAX_POSITION = 1 << 62  # the kernel takes no position beyond 2^63
MAX_SIDECAR_BYTES = 1 << 32
_READ_ONLY = ("http", "https", "hf")


@dataclass(frozen=True)
class LenHeader:
    """First line of a `.len` file.

    shard: identity of the tar it describes. samples: lines that follow. idx: length and hash of the `.idx` beside it;
    body: those of the lines that follow.
    columns: (kind, ext) of each value in a line. covered: all (kind, ext) that were looked for.
    unsafe_members: members with pickled code, never opened. damage: why the tar was not read to its end, or None.
    """

    shard: dict[str, int | str]
    samples: int
    idx: dict[str, int | str]
    body: dict[str, int | str]
    columns: tuple[tuple[str, str], ...]
    covered: tuple[tuple[str, str], ...]
    unsafe_members: int = 0
    damage: str | None = None
    format: str = LEN_FORMAT
    version: int = LEN_VERSION

    def to_line(self) -> str:
        return _dump({"format": self.format, "version": self.version, **asdict(self)}) + "\n"

    @staticmethod
    def from_line(line: bytes | str) -> "LenHeader | None":
        """The header, or None if this is not one that this version of the code writes."""
        try:
            fields = json.loads(line)
            if fields["format"] != LEN_FORMAT or fields["version"] != LEN_VERSION:
                return None
            header = LenHeader(**fields)
            pairs = {name: tuple((kind, ext) for kind, ext in getattr(header, name)) for name in ("columns", "covered")}
            hash(tuple(pairs.values()))  # raises TypeError for what no extension can be
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        counts = (header.samples, header.unsafe_members)
        sound = all(count.__class__ is int and count >= 0 for count in counts) and isinstance(header.damage, str | None)
        for facts in (header.idx, header.body):
            sound = sound and isinstance(facts, dict) and isinstance(facts.get("blake2b"), str)
        return replace(header, **pairs) if sound else None


def idx_line(members: list[tuple[str, MemberRef]]) -> str:
    """A line of `.idx` from (extension as in the tar, member) pairs; white space inside names becomes `%20`.

    DALI's reader splits at any white space, so a name that holds some would break the file for it.
    """
    return " ".join(f"{escaped(ext)} {ref.offset} {ref.size} {escaped(ref.name)}" for ext, ref in members) + "\n"


def parse_idx_line(line: bytes | str) -> list[MemberRef]:
    """Members of one sample. Raises ValueError if the line is not in the format."""
    words = (line.decode(errors="surrogateescape") if isinstance(line, bytes) else line).split()
    if not words or len(words) % 4:
        raise ValueError(f"expected groups of `ext offset size name`, got {len(words)} words")
    groups = zip(words[::4], words[3::4], words[1::4], words[2::4])
    members = [MemberRef(ext.lower(), name, int(offset), int(size)) for ext, name, offset, size in groups]
    for _, name, offset, size in members:
        if not (0 <= offset < _MAX_POSITION and 0 <= size < _MAX_POSITION):
            raise ValueError(f"member {name!r} of {size} bytes at byte {offset}")
    return members


def exact_names(members: list[MemberRef]) -> list[str] | None:
    """The members' names, if `.idx` cannot hold them as they are."""
    names = [ref.name for ref in members]
    return names if any(escaped(name) != name for name in names) else None


def len_line(values: list[Any], extra: dict[str, Any]) -> str:
    return _dump([*values, extra] if extra else values) + "\n"


def digest(data: bytes) -> dict[str, int | str]:
    return {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


def is_whole(header: LenHeader, lengths: bytes) -> bool:
    """Whether a `.len` is this header and the body that the header was written for."""
    start = header.to_line().encode()
    return lengths.startswith(start) and digest(lengths[len(start) :]) == header.body


def sidecar_places(url: str) -> list[str]:
    """Where the sidecars of a shard may be, as URLs without the ending, in the order they are tried: beside it, then
    in the local cache (see `cache.cache_root`), for shards in folders or buckets that this user cannot write to.

    Those of tar.gz are kept in the cache only, for they describe the unpacked file; nothing is ever written to http
    servers, and to the Hugging Face hub, where each write is a commit.
    """
    address = url if is_remote(url) else os.path.abspath(local_path(url))
    folder = hashlib.blake2b(address.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    stem = plain_name(url) if is_remote(url) else local_path(url)
    for ending in (*COMPRESSED, ".tar"):
        stem = stem.removesuffix(ending)
    cached = os.path.join(cache_root(), "sidecars", folder, os.path.basename(stem))
    return [cached] if is_compressed(url) else [stem, cached]


def read_header(place: str) -> LenHeader | None:
    """Header of the `.len` at a place; None if there is none that this code wrote."""
    try:
        if is_remote(place):
            start, _ = with_retries(
                lambda: remote.fetch(place + ".len", 0, _MAX_HEADER_BYTES, None, settings().timeout_s),
                f"looking for {shown(place)}.len",
            )
        else:
            with open(place + ".len", "rb") as file:
                start = file.readline(_MAX_HEADER_BYTES)
    except (OSError, DataError) as error:
        if isinstance(error, DataError) and not isinstance(error.__cause__, FileNotFoundError | PermissionError):
            _log.warning("%s; the sidecars in the local cache are used", error)
        return None
    return LenHeader.from_line(start.split(b"\n", 1)[0])


def read_sidecars(place: str) -> tuple[bytes, bytes]:
    """(.idx, .len) as they are. Raises OSError or DataError."""
    idx, lengths = (
        with_retries(lambda path=place + ending: read_whole(path, MAX_SIDECAR_BYTES), f"reading {shown(place)}{ending}")
        for ending in (".idx", ".len")
    )
    return idx, lengths


def is_writable(place: str) -> bool:
    """Whether sidecars are ever written there, if its storage lets this user."""
    return scheme(place) not in _READ_ONLY and "::" not in place


def write_sidecars(url: str, idx: bytes, lengths: bytes) -> str:
    """Write both files to the first place that takes them, `.len` last; returns the place.

    Raises:
        DataError: neither the shard's folder nor the cache can be written.
    """
    refusals = []
    for place in sidecar_places(url):
        if not is_writable(place):
            continue
        try:
            if is_remote(place):
                _, path = filesystem(place)
                for ending, data in ((".idx", idx), (".len", lengths)):
                    remote.call(place, "pipe_file", path + ending, data, timeout_s=settings().timeout_s)
            else:
                os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
                if not _holds(place + ".idx", idx):  # a right one made by `wds2idx` stays as it is
                    _replace_file(place + ".idx", idx)
                _replace_file(place + ".len", lengths)
        except (OSError, NotImplementedError, DataError) as error:
            refusals.append(f"{place}.len ({error})")
            continue
        if refusals:
            _log.info("sidecars of %s are kept in %s: cannot write %s", shown(url), os.path.dirname(place), refusals[0])
        return place
    raise DataError(
        f"cannot write the sidecars of shard {shown(url)}: tried {' and '.join(refusals)}; make one of the folders "
        f"writable, set {CACHE_VARIABLE} to a folder that is, or run `trichord data index` as one who may write"
    )


def line_starts(data: bytes, samples: int) -> array:
    """Byte offset of each sample's line (the first line of a file is its header), and the end of the last."""
    starts = array("Q")
    position = data.find(b"\n") + 1
    while position and position < len(data) and len(starts) < samples:
        starts.append(position)
        position = data.find(b"\n", position) + 1
    if len(starts) != samples or not position:
        raise ValueError(f"a sidecar should hold {samples} samples, and holds {len(starts)} lines")
    starts.append(position)
    return starts


def _holds(path: str, data: bytes) -> bool:
    try:
        return os.path.getsize(path) == len(data) and Path(path).read_bytes() == data
    except OSError:
        return False


def _replace_file(path: str, data: bytes) -> None:
    """Several processes may write the same sidecar: each writes its own file, and the last rename stands."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".sidecar-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, and colleagues read these
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def escaped(word: str) -> str:
    return "".join(f"%{ord(char):02X}" if char.isspace() else char for char in word)


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
