"""16-bit PCM WAV by walking its chunks: some 50 us for 5 s, and a crop is read without the rest of the clip."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trichord.samples.member import Read

_MAX_CHUNKS = 256
_PCM, _EXTENSIBLE = 1, 0xFFFE
_PCM_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what a writer leaves that cannot seek back, as in a pipe


class WavHeader(NamedTuple):
    """A clip of 16-bit samples from `offset` of the member on."""

    frames: int
    rate: int
    channels: int
    offset: int


def read_wav_header(read: Read, size: int) -> WavHeader | None:
    """None: no RIFF WAVE, or none of 16-bit PCM; libsndfile knows the others.

    Args:
        size: bytes of the whole member.

    Raises:
        ValueError: a RIFF WAVE that is cut or makes no sense.
    """
    head = read(0, 4096)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    layout: tuple[int, int] | None = None  # rate, channels
    position = 12
    for _ in range(_MAX_CHUNKS):
        chunk = _slice(head, read, position, 8)
        if len(chunk) < 8:
            break
        name, length = chunk[:4], int.from_bytes(chunk[4:8], "little")
        position += 8
        if name == b"data":
            if layout is None:
                raise ValueError("WAV whose samples come before their format")
            return _data_chunk(position, length, size, *layout)
        if name == b"fmt ":
            layout = _sixteen_bit_layout(_slice(head, read, position, min(length, 40)))
            if layout is None:
                return None
        position += length + length % 2
    raise ValueError("WAV without samples")


def read_wav_frames(read: Read, header: WavHeader, start: int, count: int) -> np.ndarray:
    """int16 (count, channels) from frame `start` on. Raises ValueError when the member ends before."""
    width = 2 * header.channels
    data = read(header.offset + start * width, count * width)
    if len(data) != count * width:
        raise ValueError(f"WAV cut short: {len(data)} of {count * width} bytes of samples are there")
    return np.frombuffer(data, dtype="<i2").reshape(count, header.channels)


def _slice(head: bytes, read: Read, position: int, size: int) -> bytes:
    if position + size <= len(head):
        return head[position : position + size]
    return read(position, size)


def _sixteen_bit_layout(chunk: bytes) -> tuple[int, int] | None:
    """Rate and channels of a `fmt ` chunk, None where it is not 16-bit PCM."""
    if len(chunk) < 16:
        raise ValueError(f"WAV with a format chunk of {len(chunk)} bytes")
    tag, channels = int.from_bytes(chunk[0:2], "little"), int.from_bytes(chunk[2:4], "little")
    rate = int.from_bytes(chunk[4:8], "little")
    align, bits = int.from_bytes(chunk[12:14], "little"), int.from_bytes(chunk[14:16], "little")
    if tag == _EXTENSIBLE and chunk[26:40] == _PCM_GUID_TAIL:
        tag = int.from_bytes(chunk[24:26], "little")
    if tag != _PCM or bits != 16:
        return None
    if channels == 0 or rate == 0 or align != 2 * channels:
        raise ValueError(f"WAV of {channels} channels at {rate} Hz with {align} bytes a frame")
    return rate, channels


def _data_chunk(position: int, length: int, size: int, rate: int, channels: int) -> WavHeader:
    there = size - position
    if length in _UNKNOWN_SIZES:
        length = there
    if length > there:
        raise ValueError(f"WAV cut short: {there} of {length} bytes of samples are there")
    return WavHeader(length // (2 * channels), rate, channels, position)
