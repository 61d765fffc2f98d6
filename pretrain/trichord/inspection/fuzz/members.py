"""Mutations of member bytes: blind ones for any content, and header fields of each format with checksums set right."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 100, 4096, 6000, 0x7FFF, 0x8000, 0xFFDC, 0xFFFF, 10**6, 2**30, 2**31 - 1, 2**31,
           2**32 - 1, 2**36 - 1, 2**63 - 1, 2**64 - 1)  # fmt: skip


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    mangled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if mangled:
            mangled[_early(rng, len(mangled))] ^= 1 << rng.randrange(8)
    return bytes(mangled)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = _early(rng, len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 7, 512))), b"\0" * 600, data[:100])) + data[at:]


def remove(rng: random.Random, data: bytes) -> bytes:
    at = _early(rng, len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 4, 100, 1000)) :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A number that breaks things, in one of the widths and byte orders that headers use."""
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    number = (rng.choice(NUMBERS) % 256**width).to_bytes(width, order)
    at = _early(rng, max(1, len(data) - width))
    return data[:at] + number + data[at + width :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = _early(rng, len(data) + 1)
    part = data[start : start + rng.choice((8, 200, 2000))]
    return data[:start] + part * rng.choice((2, 20, 200)) + data[start:]


def garbage(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"", b"\0" * 1000, rng.randbytes(300), data[::-1], data[:12] + rng.randbytes(500)))


def _early(rng: random.Random, length: int) -> int:
    """A position, half of the time in the first 128 bytes, where headers are."""
    return rng.randrange(max(1, min(length, 128) if rng.random() < 0.5 else length))


BLIND: tuple[Mutation, ...] = (flip_bits, truncate, insert, remove, overwrite, repeat, garbage)


def jpeg_header(rng: random.Random, data: bytes) -> bytes:
    """Frame header, segment lengths, sampling, EXIF; or so many scans that decoding is the attack."""
    segments = _jpeg_segments(data)
    frames = [at for marker, at in segments if marker in (0xC0, 0xC1, 0xC2)]
    if not frames:
        return overwrite(rng, data)
    frame, mangled = frames[0], bytearray(data)
    way = rng.randrange(6)
    if way == 0:  # height, width
        side = rng.choice(NUMBERS[:13])
        mangled[frame + 5 : frame + 9] = struct.pack(">HH", side & 0xFFFF, rng.choice((side, 16, 0xFFFF)) & 0xFFFF)
    elif way == 1:  # precision, components, sampling, tables
        mangled[frame + rng.choice((4, 9, 10, 11, 12))] = rng.choice((0, 1, 3, 4, 12, 0x11, 0x44, 0xFF))
    elif way == 2:  # length of any segment
        at = rng.choice(segments)[1]
        mangled[at + 2 : at + 4] = struct.pack(">H", rng.choice((0, 1, 2, 3, 0x7FFF, 0xFFFF)))
    elif way == 3:
        exif = b"Exif\0\0" + rng.choice((b"MM\0*", b"II*\0", b"II+\0")) + rng.randbytes(rng.choice((4, 40, 4000)))
        mangled[2:2] = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    elif way == 4:
        return _many_scans(rng, data, segments, frame)
    else:  # APP segments without end
        mangled[2:2] = (b"\xff\xe2\x00\x10" + rng.randbytes(14)) * rng.choice((1, 500))
    return bytes(mangled)


def _many_scans(rng: random.Random, data: bytes, segments: list[tuple[int, int]], frame: int) -> bytes:
    """The last scan again and again over a large frame: small to send, long to decode."""
    scans = [at for marker, at in segments if marker == 0xDA]
    if not scans:
        return data
    side = rng.choice((16, 2000, 7000))
    body = data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 : -2]
    return body + data[scans[-1] : -2] * rng.choice((10, 200, 2000)) + b"\xff\xd9"


def _jpeg_segments(data: bytes) -> list[tuple[int, int]]:
    """(marker, position) of each segment up to the end of the image."""
    found, at = [], 2
    while 0 <= at < len(data) - 4 and data[at] == 0xFF:
        marker = data[at + 1]
        found.append((marker, at))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            at = data.find(b"\xff", at)
            while 0 <= at < len(data) - 1 and (data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7):
                at = data.find(b"\xff", at + 2)
    return found


def png_header(rng: random.Random, data: bytes) -> bytes:
    """IHDR fields, chunk lengths, chunks that unpack to much, animation; checksums are mostly right."""
    chunks = _png_chunks(data)
    if not chunks:
        return overwrite(rng, data)
    way = rng.randrange(6)
    if way == 0:
        header = bytearray(chunks[0][1])
        sides = rng.choice(((65535, 65535), (0, 5), (7000, 7000), (2**31 - 1, 1), (1, 2**31), (12000, 4000)))
        header[:8] = struct.pack(">II", *sides)
        chunks[0] = (b"IHDR", bytes(header))
    elif way == 1:
        header = bytearray(chunks[0][1].ljust(13, b"\0"))
        header[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 7, 8, 16, 255))
        chunks[0] = (b"IHDR", bytes(header))
    elif way == 2:
        packed = zlib.compress(b"\0" * rng.choice((1000, 2**20, 2**26)), 1)
        kind, front = rng.choice(((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")))
        chunks.insert(1, (kind, front + packed))
    elif way == 3:
        return _flat_png(rng)
    elif way == 4:
        kind = rng.choice((b"acTL", b"fcTL", b"fdAT", b"eXIf", b"tRNS", b"PLTE", b"IEND", b"gAMA", b"pHYs", b"cHRM"))
        chunks.insert(rng.randrange(len(chunks)) + 1, (kind, rng.randbytes(rng.choice((0, 1, 8, 26, 800)))))
    else:
        chunks = chunks[:1] + chunks[1:] * rng.choice((2, 300))
    body = b"".join(_png_chunk(kind, content) for kind, content in chunks)
    return data[:8] + (body if rng.random() < 0.9 else overwrite(rng, body))


def _flat_png(rng: random.Random) -> bytes:
    """A picture of one colour just under the cap on pixels: a few kB that become hundreds of MB."""
    side, depth, colour, bytes_per_pixel = rng.choice(
        ((3000, 8, 2, 3), (7000, 8, 0, 1), (7000, 8, 2, 3), (7000, 16, 6, 8), (7000, 16, 0, 2), (7070, 1, 0, 1 / 8))
    )
    row = 1 + -int(-side * bytes_per_pixel // 1)
    packer = zlib.compressobj(1)
    block = b"\0" * (row * 50)
    packed = b"".join([*(packer.compress(block) for _ in range(side // 50)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data) and data.startswith(b"\x89PNG"):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def riff_header(rng: random.Random, data: bytes) -> bytes:
    """wav and webp: sizes of chunks, fields of `fmt `, canvas of VP8X, chunks out of order or missing."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((at, size))
        at += 8 + size + (size & 1)
    if not chunks or data[:4] != b"RIFF":
        return overwrite(rng, data)
    mangled, (at, size) = bytearray(data), rng.choice(chunks)
    way = rng.randrange(4)
    number = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
    if way == 0:
        mangled[at + 4 : at + 8] = number
    elif way == 1:
        place = at + 8 + rng.randrange(0, max(1, min(size, 40)))
        width = rng.choice((1, 2, 4))
        mangled[place : place + width] = number[:width]
    elif way == 2:
        first = chunks[0][0] + 8 + rng.choice((0, 2, 4, 8, 12, 14, 16))  # format, channels, rate, bytes/s, align, bits
        mangled[first : first + 2] = number[:2]
    else:
        other = rng.choice(chunks)
        part = bytes(mangled[at : at + 8 + size])
        mangled[other[0] : other[0]] = part * rng.choice((1, 100))
    return bytes(mangled)


def flac_header(rng: random.Random, data: bytes) -> bytes:
    """STREAMINFO (block sizes, rate, channels, bits, total samples) and metadata block lengths."""
    if not data.startswith(b"fLaC") or len(data) < 42:
        return overwrite(rng, data)
    mangled = bytearray(data)
    way = rng.randrange(4)
    if way == 0:  # 20 bits of rate, 3 of channels, 5 of depth, 36 of total samples
        packed = int.from_bytes(mangled[18:26], "big")
        low, width = rng.choice(((44, 20), (41, 3), (36, 5), (0, 36)))
        field = rng.choice(NUMBERS) & ((1 << width) - 1)
        packed = packed & ~(((1 << width) - 1) << low) | field << low
        mangled[18:26] = packed.to_bytes(8, "big")
    elif way == 1:
        mangled[8:12] = struct.pack(">HH", rng.choice(NUMBERS) & 0xFFFF, rng.choice(NUMBERS) & 0xFFFF)
    elif way == 2:
        mangled[5:8] = (rng.choice(NUMBERS) & 0xFFFFFF).to_bytes(3, "big")
    else:
        block = bytes([rng.choice((1, 2, 3, 4, 5, 6, 126, 127))])
        content = rng.randbytes(rng.choice((0, 18, 34, 4000)))
        mangled[42:42] = (block + len(content).to_bytes(3, "big") + content) * rng.choice((1, 200))
    return bytes(mangled)


def ogg_page(rng: random.Random, data: bytes) -> bytes:
    """Fields of a page (granule position, serial, segment table) or of the codec's head, with the page's checksum."""
    starts = [at for at in range(0, len(data) - 27) if data[at : at + 4] == b"OggS"]
    if not starts:
        return overwrite(rng, data)
    at = rng.choice(starts)
    end = next((start for start in starts if start > at), len(data))
    page = bytearray(data[at:end])
    width = rng.choice((1, 2, 4, 8))
    place = rng.choice((4, 5, 6, 14, 18, 26, 27, 28, 29, 36, 37, 38, 40, 44, 46, 47, 48, 49))
    page[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    page[22:26] = b"\0\0\0\0"
    page[22:26] = struct.pack("<I", _ogg_crc(bytes(page)))
    return data[:at] + bytes(page) * rng.choice((1, 1, 1, 50)) + data[end:]


def _ogg_crc(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


def mp3_header(rng: random.Random, data: bytes) -> bytes:
    """Bits of a frame header, the Xing/Info counts, ID3 tags of any stated size."""
    mangled = bytearray(data)
    way = rng.randrange(3)
    mark = max(data.find(b"Xing"), data.find(b"Info"))
    if way == 0 and mark > 0:
        mangled[mark + 4 : mark + 12] = struct.pack(">II", 15, rng.choice(NUMBERS) & 0xFFFFFFFF)
    elif way == 1:
        frames = [at for at in range(len(data) - 4) if data[at] == 0xFF and data[at + 1] & 0xE0 == 0xE0]
        at = rng.choice(frames or [0])
        mangled[at + rng.choice((1, 2, 3)) : at + 4] = rng.randbytes(rng.choice((1, 2, 3)))
    else:
        size = bytes(rng.choice((0, 0x7F, rng.randrange(128), 0xFF)) for _ in range(4))
        mangled[:0] = b"ID3" + bytes((rng.choice((2, 3, 4, 9)), 0, rng.randrange(256))) + size + rng.randbytes(60)
    return bytes(mangled)


HEADERS: dict[str, Mutation] = {
    "jpg": jpeg_header,
    "jpeg": jpeg_header,
    "png": png_header,
    "webp": riff_header,
    "wav": riff_header,
    "flac": flac_header,
    "ogg": ogg_page,
    "opus": ogg_page,
    "mp3": mp3_header,
}
"""The mutation that knows the format, by the last part of the extension."""
