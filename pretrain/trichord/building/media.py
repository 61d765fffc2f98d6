"""Images, clips and values as sources name them: file names, bytes, cells of tables."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trichord.building.rows import CellPart
from trichord.shards.config import FieldsConfig
from trichord.shards.quarantine import BadSample

MAX_SHOWN = 60
_WAVE_FLOAT = 3


class CellPlace(NamedTuple):
    """Where bytes that a row holds can be read again, so that the list of rows need not hold them too."""

    path: str
    batch: int
    row: int
    steps: tuple[str | int, ...]


def media_member(
    value: Any, kind: str, root: Path, fields: FieldsConfig, place: CellPlace | None = None
) -> tuple[str, bytes | Path | CellPart]:
    """(extension, content) of an image or clip.

    Args:
        value: a file name, relative to `root` or absolute; the bytes; or `{"bytes": ..., "path": ...}`, of a clip also
            `{"array": ..., "sampling_rate": ...}`, as Hugging Face datasets hold them. kind: image or audio. place:
            where `value` stands, if bytes are to be read from there.

    Raises:
        BadSample: there is no such file, it lies outside of `root`, or its format is not one of `fields`.
    """
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and value.get("array") is not None and kind == "audio":
            _check_ext("wav", kind, fields, "an array of samples, which is kept as 32-bit float WAV,")
            return "wav", wav_bytes(value["array"], value.get("sampling_rate"))
        if data is not None:
            return media_member(data, kind, root, fields, place and place._replace(steps=(*place.steps, "bytes")))
        if path is not None:
            return media_member(path, kind, root, fields)
    if isinstance(value, (bytes, bytearray)):
        ext = _sniffed(bytes(value), kind)
        _check_ext(ext, kind, fields, f"{len(value)} bytes that begin as {bytes(value[:4])!r}")
        return ext, bytes(value) if place is None else CellPart(*place, len(value))
    if not isinstance(value, str) or not value:
        raise BadSample(
            f"expected a file name, or bytes, or an object with bytes or path (of a clip: array and sampling_rate); "
            f"got {shown(value)}"
        )
    if "://" in value:
        raise BadSample(f"{value} is an address; fetch the files first, for example by img2dataset")
    ext = Path(value).suffix[1:].lower()
    _check_ext(ext, kind, fields, repr(value))
    return ext, media_file(value, root)


def wav_bytes(samples: Any, rate: Any) -> bytes:
    """A WAV file of one channel in 32-bit floats, which hold 16-bit samples exactly; the same bytes every time.

    Args:
        samples: (frames,) numbers, of [-1, 1] where they are sound. rate: frames a second.

    Raises:
        BadSample: samples or rate are none.
    """
    if not isinstance(rate, int) or isinstance(rate, bool) or not 0 < rate < 2**31:
        raise BadSample(f"sampling_rate: expected a whole number of frames a second, got {shown(rate)}")
    try:
        data = array("f", samples)
    except (TypeError, OverflowError) as error:
        raise BadSample(f"array: expected a list of numbers, one channel; got {shown(samples)}") from error
    if not data or not all(map(math.isfinite, data)):
        raise BadSample("array: expected at least one frame, all of them finite")
    if sys.byteorder == "big":
        data.byteswap()
    size = 4 * len(data)
    form = struct.pack("<4sIHHIIHHH", b"fmt ", 18, _WAVE_FLOAT, 1, rate, 4 * rate, 4, 32, 0)
    fact = struct.pack("<4sII", b"fact", 4, len(data))
    head = struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(fact) + 8 + size, b"WAVE")
    return head + form + fact + struct.pack("<4sI", b"data", size) + data.tobytes()


def media_file(name: str, root: Path) -> Path:
    """The file that a source names. Raises BadSample where there is none, or a relative name leaves `root`."""
    if "\0" in name or (not os.path.isabs(name) and os.path.normpath(name).startswith("..")):
        raise BadSample(f"{name!r} lies outside of {root}; name it by its whole path, or move the file")
    file = root / name
    if not file.is_file():
        raise BadSample(f"no file {file}; paths are relative to {root}, see --media")
    return file


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    if isinstance(value, Mapping) and {*value} <= {"bytes", "path"}:
        return not any(value.values())
    if isinstance(value, Mapping) and "sampling_rate" in value:
        return not any(value.get(name) for name in ("array", "bytes", "path"))
    return value is None or value in ("", [])


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A `json` member: keys sorted, UTF-8. Dates become ISO text, NaN becomes null.

    Raises:
        BadSample: a value is binary, or of a type that JSON has not.
    """
    clean = {str(key): _plain(value, str(key)) for key, value in values.items()}
    return text_bytes(json.dumps(clean, ensure_ascii=False, sort_keys=True))


def text_bytes(text: str) -> bytes:
    """UTF-8. Raises BadSample where the text is none: half a surrogate pair, as broken JSON escapes give it."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"text that is no Unicode ({error.reason}) at character {error.start}") from error


def shown(value: Any) -> str:
    """A value in few characters, for messages."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({type(value).__name__})"


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, name) for inner in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ in ("Decimal", "UUID", "timedelta"):
        return str(value)
    raise BadSample(f"column {name}: {type(value).__name__} cannot be kept in json; drop the column, or make it text")


def _sniffed(data: bytes, kind: str) -> str:
    """Extension of bytes without a name, by how they begin; empty: unknown."""
    if kind == "image":
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "webp"
        return next(
            (ext for ext, magic in (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG")) if data.startswith(magic)), ""
        )
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"OggS":
        return "opus" if b"OpusHead" in data[:64] else "ogg"
    if data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "mp3"
    return "flac" if data[:4] == b"fLaC" else ""


def _check_ext(ext: str, kind: str, fields: FieldsConfig, what: str) -> None:
    allowed = getattr(fields, kind)
    if ext not in allowed:
        formats = ", ".join(allowed)
        raise BadSample(
            f"{what} ends in '.{ext}'; expected {formats}" if ext else f"{what}: none of {formats}; convert it"
        )
