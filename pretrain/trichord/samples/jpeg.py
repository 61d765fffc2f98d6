"""JPEG bytes to RGB, strictly: what libjpeg-turbo would mend with a warning is refused. Figures: docs/data/decode.md.

The header is read first and decides everything that costs memory; decoding itself may happen at a half, a quarter or an
eighth of the size, inside the inverse transform, which is both faster and a good low-pass filter.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

JPEG_MAGIC = b"\xff\xd8\xff"
MAX_SCANS = 200
"""Progressive files have some ten scans. Each one costs a pass over the whole picture, however few bytes it has."""
_EXIF_ORIENTATION = 0x0112
_SMALLEST_FACTOR = 8
_APP1, _SOS = 0xE1, 0xDA
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
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    return JpegHeader(int(width), int(height), _orientation(data), "cmyk" if colour in ("CMYK", "YCCK") else "rgb")


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
    """Pillow's answer, EXIF first and XMP second, asked for only where a segment could hold either."""
    if not _has_app1(data):
        return 1
    orientation = Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _has_app1(data: bytes) -> bool:
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return True  # no chain of segments: let Pillow look
        marker = data[position + 1]
        if marker == _APP1:
            return True
        if marker == _SOS:
            return False
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _BARE_MARKERS:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False
