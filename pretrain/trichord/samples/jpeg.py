"""JPEG bytes to RGB, strictly: what libjpeg-turbo would mend with a warning is refused. Figures: docs/data/decode.md.

The header is read first and decides everything that costs memory; decoding itself may happen at a half, a quarter or an
eighth of the size, inside the inverse transform, which is both faster and a good low-pass filter.
"""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

JPEG_MAGIC = b"\xff\xd8\xff"
MAX_SCANS = 200
"""Progressive files have some ten scans. Each one costs a pass over the whole picture, however few bytes it has."""
_EXIF_ORIENTATION = 0x0112
_SMALLEST_FACTOR = 8
_APP1, _SOS = 0xE1, 0xDA
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SCAN_START = re.compile(b"\xff\xda")
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})  # without a length behind them


class JpegHeader(NamedTuple):
    """width, height as stored; orientation: EXIF's 1 to 8; colour: one of "rgb" (grey too), "cmyk"."""

    width: int
    height: int
    orientation: int
    colour: str


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """None: nothing that the fast decoder knows; Pillow then says what it is, or what is wrong with it.

    Raises:
        ValueError: more scans than any honest file has.
    """
    import simplejpeg

    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    may_be_turned, progressive = _walk_segments(data)
    if progressive and len(_SCAN_START.findall(data)) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    orientation = _orientation(data) if may_be_turned else 1
    return JpegHeader(int(width), int(height), orientation, "cmyk" if colour in ("CMYK", "YCCK") else "rgb")


def shrink_factor(side: float, wanted: int) -> int:
    """1, 2, 4 or 8: the strongest reduction of a crop's shorter `side` that leaves 1.5 times the `wanted` pixels."""
    factor = 1
    while factor < _SMALLEST_FACTOR and side >= 1.5 * wanted * 2 * factor:
        factor *= 2
    return factor


def decode_jpeg(data: bytes, header: JpegHeader, factor: int) -> np.ndarray:
    """uint8 (ceil(height / factor), ceil(width / factor), 3), not turned. factor: 1, 2, 4 or 8.

    Raises:
        ValueError: the data is cut or damaged, be it in a way that a lenient decoder would guess over.
    """
    import simplejpeg

    if header.colour == "cmyk":
        simplejpeg.decode_jpeg(data, "CMYK")  # for its strictness: Pillow mends, but it knows Adobe's inverted inks
        image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
        return np.asarray(image.reduce(factor) if factor > 1 else image)
    min_height, min_width = -(-header.height // factor), -(-header.width // factor)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width, min_factor=factor)


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as stored to a view of it as EXIF says it is meant."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _orientation(data: bytes) -> int:
    """Pillow's answer: EXIF's, else XMP's."""
    orientation = Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _walk_segments(data: bytes) -> tuple[bool, bool]:
    """Whether a segment before the picture could hold an orientation, and whether the picture has many scans."""
    position, may_be_turned, progressive = 2, False, False
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:
            return True, True  # no chain of segments: suppose both
        if marker == _SOS:
            break
        may_be_turned |= marker == _APP1
        progressive |= marker in _PROGRESSIVE
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _BARE_MARKERS:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return may_be_turned, progressive
