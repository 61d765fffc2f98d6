"""Mutations of a whole tar: header fields with the checksum set right or wrong, PAX and GNU records, blocks, gzip."""

from __future__ import annotations

import gzip
import random
import tarfile
import zlib

from trichord.inspection.fuzz.members import BLIND, NUMBERS, flip_bits, overwrite, truncate

_BLOCK = 512
_FIELDS = {  # name: (offset, size)
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12),
    "chksum": (148, 8), "typeflag": (156, 1), "linkname": (157, 100), "magic": (257, 6), "version": (263, 2),
    "uname": (265, 32), "devmajor": (329, 8), "prefix": (345, 155), "sparse": (386, 125),
}  # fmt: skip
_TYPES = b"\x000123456789LKSxgXDMNVA\xff"


def _pax(**fields: str) -> bytes:
    """PAX records with their lengths right; `__` in a key stands for a dot."""
    records = b""
    for key, value in fields.items():
        body = f" {key.replace('__', '.')}={value}\n".encode(errors="surrogateescape")
        size = len(body) + 1
        while size != len(body) + len(str(size)):
            size += 1
        records += str(size).encode() + body
    return records


_PAX = (
    _pax(size="4294967296"), _pax(size="-1"), _pax(size="1e3"), _pax(size="9" * 30), _pax(size="9" * 5000),
    _pax(path="../a.jpg"), _pax(path="/etc/passwd.txt"), _pax(path="\udcff.txt"), _pax(path=""),
    _pax(path="d/" * 9000 + "x.txt"),
    _pax(linkpath="/etc/passwd"), _pax(hdrcharset="BINARY"), _pax(mtime="nan"), _pax(mtime="1e99"), _pax(uid="-1"),
    _pax(GNU__sparse__major="1"), _pax(GNU__sparse__map="0,1,2"), _pax(GNU__sparse__map="x", GNU__sparse__size="9e9"),
    _pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="a.txt", GNU__sparse__realsize="99999999"),
    _pax(GNU__sparse__map="0,99999999999", GNU__sparse__size="9"),
    _pax(GNU__sparse__map="1," * 50_000, GNU__sparse__size="9"),
    b"99999999999 path=x\n", b"0 path=x\n", b"path=x\n", b"11 path=\xff\xfe\n", b"9 path=a", b"\xff" * 200, b"",
    b"9" * 5000, b"4 =\n" * 100, b" " * 500, b"8 a=b\n\0\0" * 60_000,
)  # fmt: skip


def mangle_tar(rng: random.Random, tar: bytes) -> bytes:
    """One fault in the container."""
    ways = (_field, _field, _field, _records, _chain, _blocks, _blocks, _ends, rng.choice(BLIND))
    return rng.choice(ways)(rng, tar)


def header_offsets(tar: bytes) -> list[int]:
    """Where headers of a well-made tar start."""
    offsets, at = [], 0
    while at + _BLOCK <= len(tar) and any(tar[at : at + _BLOCK]):
        try:
            size = tarfile.nti(tar[at + 124 : at + 136])
        except tarfile.HeaderError:
            break
        offsets.append(at)
        at += _BLOCK + -(-max(size, 0) // _BLOCK) * _BLOCK
    return offsets


def _field(rng: random.Random, tar: bytes) -> bytes:
    """A header field of any value; mostly with a checksum that fits, so that the reader believes it."""
    offsets = header_offsets(tar)
    if not offsets:
        return overwrite(rng, tar)
    at = rng.choice(offsets)
    block = bytearray(tar[at : at + _BLOCK])
    name = rng.choice(("size", "size", "typeflag", "typeflag", *_FIELDS))
    start, width = _FIELDS[name]
    block[start : start + width] = _field_value(rng, name, width)
    if name != "chksum" and rng.random() < 0.85:
        block = _with_checksum(block)
    return tar[:at] + bytes(block) + tar[at + _BLOCK :]


def _field_value(rng: random.Random, name: str, width: int) -> bytes:
    if name == "typeflag":
        return bytes((rng.choice(_TYPES),))
    number = rng.choice(NUMBERS)
    kinds = (
        rng.randbytes(width),
        b"\0" * width,
        b"\xff" * width,
        b" " * width,
        b"%o" % number,
        b"-%o" % number,
        b"%d\0" % number,
        b"9" * width,
        b"\x80" + number.to_bytes(max(width - 1, 8), "big")[-(width - 1) :] if width > 1 else b"",  # base 256
        b"\xff" + (256 ** (width - 1) - 1 - number % 200).to_bytes(width - 1, "big") if width > 1 else b"",  # negative
        rng.choice((b"../../x.txt", b"/x.txt", b"\xff\xfe.txt", b"a.jpg", b"x.pkl", b"a\nb.txt", b"..", b".")),
    )
    return rng.choice(kinds)[:width].ljust(width, b"\0")


def _with_checksum(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def _header(name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(_BLOCK)
    block[: len(name[:100])] = name[:100]
    block[100:108], block[124:136], block[156:157] = b"0000644\0", b"%011o\0" % size, kind
    block[257:265] = b"ustar\x0000"
    return bytes(_with_checksum(block))


def _record(name: bytes, kind: bytes, content: bytes, stated: int | None = None) -> bytes:
    size = len(content) if stated is None else stated
    return _header(name, size % 8**11, kind) + content + b"\0" * (-len(content) % _BLOCK)


def _records(rng: random.Random, tar: bytes) -> bytes:
    """A PAX or GNU record in front of a member, of any content and stated size."""
    at = rng.choice(header_offsets(tar) or [0])
    kind = rng.choice((b"x", b"x", b"g", b"X", b"L", b"K", b"S"))
    names = (b"a.jpg\0", b"x" * 5000 + b".txt\0", b"../../x.txt\0", b"x" * 2**20, b"\xff.txt", b"", b"a\nb c.txt")
    content = rng.choice(_PAX if kind in b"xgX" else names)
    stated = rng.choice((None, None, None, 0, 2**32, len(content) + 5000, 8**11 - 1))
    return tar[:at] + _record(b"record", kind, content, stated) + tar[at:]


def _chain(rng: random.Random, tar: bytes) -> bytes:
    """Record upon record: each is read before the member it belongs to, by recursion in some readers."""
    at = rng.choice(header_offsets(tar) or [0])
    kind = rng.choice((b"x", b"L", b"K", b"g", b"S"))
    content = b"9 path=a\n" if kind in b"xg" else b"a.txt\0"
    return tar[:at] + _record(b"record", kind, content) * rng.choice((2, 50, 1500, 4000)) + tar[at:]


def _blocks(rng: random.Random, tar: bytes) -> bytes:
    """Blocks zeroed, doubled, dropped, swapped or filled with noise."""
    blocks = [tar[at : at + _BLOCK] for at in range(0, len(tar), _BLOCK)]
    offsets = [offset // _BLOCK for offset in header_offsets(tar)]
    at = rng.choice(offsets) if offsets and rng.random() < 0.6 else rng.randrange(max(1, len(blocks)))
    count, way = rng.choice((1, 1, 2, 7)), rng.randrange(5)
    part = blocks[at : at + count]
    if way == 0:
        blocks[at : at + count] = [b"\0" * _BLOCK] * len(part)
    elif way == 1:
        blocks[at:at] = part * rng.choice((1, 40))
    elif way == 2:
        del blocks[at : at + count]
    elif way == 3:
        other = rng.randrange(max(1, len(blocks)))
        blocks[at : at + count], blocks[other : other + count] = blocks[other : other + count], part
    else:
        blocks[at : at + count] = [rng.randbytes(_BLOCK)] * len(part)
    return b"".join(blocks)


def _ends(rng: random.Random, tar: bytes) -> bytes:
    """Cut at any byte, no end marker, something behind it, two archives in one, or no tar at all."""
    others = (
        tar[: rng.randrange(len(tar) + 1)],
        tar.rstrip(b"\0"),
        tar + tar,
        tar + rng.randbytes(700),
        tar + b"\0" * 100_000,
        rng.randbytes(512) + tar,
        b"\0" * 512 + tar,
        b"\0" * rng.choice((1, 511, 512, 1024, 10_240)),
        b"",
        b"<html><body>404 not found</body></html>" * 30,
        b"\x1f\x8b" + tar,
        b"BZh9" + tar,
        b"PK\x03\x04" + tar,
    )
    return rng.choice(others)


def mangle_gzip(rng: random.Random, tar: bytes) -> bytes:
    """The tar compressed, and a fault in the compressed bytes; or a small file that unpacks to a large one."""
    packed = gzip.compress(tar, 1, mtime=0)
    way = rng.randrange(14)
    if way == 0:
        return flip_bits(rng, packed)
    if way == 1:
        return truncate(rng, packed)
    if way == 2:
        return packed + rng.choice((packed, b"\0" * 100, rng.randbytes(100), b"\x1f\x8b"))
    if way == 3:
        return packed[:-8] + rng.randbytes(8)
    if way == 4:
        return packed[:3] + bytes((rng.randrange(256),)) + packed[4:]
    if way == 5:  # a bomb: members of 1 MiB of zeros, and the index must not follow it without end
        return packed + gzip.compress(b"\0" * 2**20, 1, mtime=0) * rng.choice((10, 64))
    if way == 6:
        return zlib.compress(tar, 1)
    return packed if way < 10 else gzip.compress(mangle_tar(rng, tar), 1, mtime=0)
