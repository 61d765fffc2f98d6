"""Whether a compressed clip has its end: what its container says, which decoders of cut files do not ask."""

from __future__ import annotations

OGG_TAIL_BYTES = 65_536
"""No Ogg page is longer: 27 bytes, a table of 255 and as many segments of at most 255."""
_PAGE_HEADER_BYTES = 27
_OGG_PAGE = b"OggS\0"  # with the version of the format, so that such letters in a sound are no page
_END_OF_STREAM = 4
_ID3_BYTES = 10
_SYNC_BYTES = 4096
_LAYER_3 = 1
_MPEG_1 = 3
_MONO = 3
_FRAMES_OFF = 8
"""MPEG frames that a header may promise too many: encoders pad at both ends, and decoders take that away again."""
_SHARE_OFF = 0.01


def ogg_is_ended(tail: bytes) -> bool:
    """Whether the last page of an Ogg file is whole and ends a stream. tail: its last `OGG_TAIL_BYTES`, or all."""
    at = tail.rfind(_OGG_PAGE)
    page = tail[at:] if at >= 0 else b""
    if len(page) < _PAGE_HEADER_BYTES:
        return False
    segments = page[_PAGE_HEADER_BYTES - 1]
    length = _PAGE_HEADER_BYTES + segments + sum(page[_PAGE_HEADER_BYTES : _PAGE_HEADER_BYTES + segments])
    return length <= len(page) and bool(page[5] & _END_OF_STREAM)


def mp3_is_cut(data: bytes, frames: int) -> bool:
    """Whether an MP3's Xing, Info or VBRI header promises clearly more than the `frames` that were decoded of it."""
    found = _promise(data)
    if found is None:
        return False
    promised, per_frame = found
    return frames < promised - max(_FRAMES_OFF * per_frame, _SHARE_OFF * promised)


def _promise(data: bytes) -> tuple[int, int] | None:
    """(frames, frames per MPEG frame) by the header; None where there is none."""
    start = _first_frame(data)
    if start is None:
        return None
    mpeg1 = data[start + 1] >> 3 & 3 == _MPEG_1
    mono = data[start + 3] >> 6 == _MONO
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    checked = 0 if data[start + 1] & 1 else 2  # two bytes of CRC
    xing = start + 4 + checked + side
    per_frame = 1152 if mpeg1 else 576
    if data[xing : xing + 4] in (b"Xing", b"Info") and len(data) >= xing + 12 and data[xing + 7] & 1:
        return int.from_bytes(data[xing + 8 : xing + 12], "big") * per_frame, per_frame
    vbri = start + 36
    if data[vbri : vbri + 4] == b"VBRI" and len(data) >= vbri + 18:
        return int.from_bytes(data[vbri + 14 : vbri + 18], "big") * per_frame, per_frame
    return None


def _first_frame(data: bytes) -> int | None:
    """Where the first MPEG frame of layer III begins, behind an ID3v2 tag."""
    start = 0
    if data[:3] == b"ID3" and len(data) >= _ID3_BYTES:
        size = sum((byte & 127) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
        start = _ID3_BYTES * (2 if data[5] & 16 else 1) + size
    at = data.find(b"\xff", start, start + _SYNC_BYTES)
    while at >= 0:
        if len(data) >= at + 4 and data[at + 1] & 0xE0 == 0xE0 and data[at + 1] >> 1 & 3 == _LAYER_3:
            return at
        at = data.find(b"\xff", at + 1, start + _SYNC_BYTES)
    return None
