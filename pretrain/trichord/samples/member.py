"""A member of a shard that is read in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trichord.core.phase import phase
from trichord.shards.members import MemberRef
from trichord.shards.reader import read_ref

Read = Callable[[int, int], bytes]
"""(offset, size) -> that part of a member; shorter only at its end."""


@dataclass(frozen=True)
class MemberReader:
    """size: bytes of the member; read: its parts."""

    size: int
    read: Read

    @classmethod
    def of(cls, data: bytes) -> MemberReader:
        return cls(len(data), lambda offset, size: data[offset : offset + size])


def open_member(shard: str, ref: MemberRef, max_bytes: int) -> MemberReader:
    """A member where it lies.

    Reading raises BadSample for more than `max_bytes` at once or where the shard is cut, DataError where storage fails.
    """

    def read(offset: int, size: int) -> bytes:
        size = min(size, ref.size - offset)
        if size <= 0:
            return b""
        with phase("read", shard=shard, member=ref.name):
            return read_ref(shard, ref._replace(offset=ref.offset + offset, size=size), max_bytes)

    return MemberReader(ref.size, read)
