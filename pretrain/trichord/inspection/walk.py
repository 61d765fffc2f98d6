"""One shard from its first header to its last: what its index does not say."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from trichord.core.errors import DataError
from trichord.inspection.exclusions import key_hash
from trichord.shards import sidecars
from trichord.shards.config import FieldsConfig
from trichord.shards.index import load_index
from trichord.shards.members import FoundMember, WalkReport, is_unsafe, walk_members
from trichord.shards.storage import open_shard, shard_identity, with_retries

MAX_EXAMPLES = 5
_MAX_EXTENSIONS = 1000  # a shard without a scheme of names has as many as it has members


@dataclass
class ShardFacts:
    """What a shard holds and what is odd about it.

    problem: why nothing of it can be read. sidecars: "fresh", or why they are not. damage: why its end was not reached.
    members, member_bytes: by extension. returning: keys that come back after other keys (counted; some examples): each
    time they are another sample, with a part of the members. unsafe: members with pickled code, likewise.
    other_members: files that belong to no sample. key_hashes: 16 bytes per sample.
    """

    url: str
    samples: int = 0
    bytes: int = 0
    problem: str | None = None
    sidecars: str = "fresh"
    damage: str | None = None
    members: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    returning: int = 0
    returning_examples: list[str] = field(default_factory=list)
    unsafe: int = 0
    unsafe_examples: list[str] = field(default_factory=list)
    other_members: int = 0
    key_hashes: bytes = b""


def walk_shard(job: tuple[str, FieldsConfig]) -> ShardFacts:
    """Read all headers of a shard (url, the fields of its source) and hold them against its sidecars.

    Missing and stale sidecars are made, as training would make them.
    """
    url, fields = job
    facts = ShardFacts(url)
    try:
        facts.sidecars = _sidecar_state(url)
        index = load_index(url, fields)
        places = with_retries(lambda: _walk(url, facts), f"reading shard {url}")
    except DataError as error:
        facts.problem = str(error)
        return facts
    facts.samples, facts.damage = index.num_samples, index.damage
    if facts.sidecars == "fresh" and not _matches(url, places):
        facts.sidecars = "do not match the tar, though size and time do; remove its .idx and .len files"
    return facts


def _walk(url: str, facts: ShardFacts) -> array:
    """(offset, size) of all members in order; fills in `facts`."""
    fresh = ShardFacts(url, sidecars=facts.sidecars)
    facts.__dict__.update(fresh.__dict__)  # a retry begins anew
    report, places, hashes = WalkReport(), array("Q"), bytearray()
    seen: set[bytes] = set()
    last = None
    with open_shard(url) as file:
        facts.bytes = file.seek(0, 2)
        file.seek(0)
        for found in walk_members(file, facts.bytes, url, report):
            places.extend((found.ref.offset, found.ref.size))
            _count(found, facts)
            if found.key != last:
                last = found.key
                digest = key_hash(last)
                hashes += digest
                if digest in seen:
                    facts.returning += 1
                    _example(facts.returning_examples, last)
                seen.add(digest)
    facts.key_hashes, facts.other_members = bytes(hashes), report.other_members
    return places


def _count(found: FoundMember, facts: ShardFacts) -> None:
    ext = found.ref.ext if found.ref.ext in facts.members or len(facts.members) < _MAX_EXTENSIONS else "(other)"
    facts.members[ext] += 1
    facts.member_bytes[ext] += found.ref.size
    if is_unsafe(found.ref.ext):
        facts.unsafe += 1
        _example(facts.unsafe_examples, found.ref.name)


def _example(examples: list[str], text: str) -> None:
    if len(examples) < MAX_EXAMPLES:
        examples.append(text)


def _sidecar_state(url: str) -> str:
    """ "fresh", or what is wrong with the sidecars before anyone makes them anew."""
    identity = shard_identity(url)
    headers = [sidecars.read_header(place) for place in sidecars.sidecar_places(url)]
    found = [header for header in headers if header is not None]
    if not found:
        return "missing or not readable; made now"
    return "fresh" if any(header.shard == identity for header in found) else "stale: the shard has changed; made anew"


def _matches(url: str, places: array) -> bool:
    """Whether the members of the `.idx` lie where the walk met them. A damaged tar's last sample is not in it."""
    for place in sidecars.sidecar_places(url):
        try:
            idx, _ = sidecars.read_sidecars(place)
        except (OSError, ValueError):
            continue
        position = 0
        for offset, size in _places_in(idx):
            if places[position : position + 2] != array("Q", (offset, size)):
                return False
            position += 2
        return True
    return False


def _places_in(idx: bytes) -> Iterator[tuple[int, int]]:
    for line in idx.split(b"\n")[1:]:
        if line:
            yield from ((ref.offset, ref.size) for ref in sidecars.parse_idx_line(line))
