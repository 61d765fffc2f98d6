"""Valid samples of every format, small enough that a case costs milliseconds; what the attack mangles."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import soundfile
from PIL import Image

Members = dict[str, bytes]
"""Content of one sample's members by extension."""

_AUDIO = (
    # extension, container, subtype, rate, channels
    ("wav", "WAV", "PCM_16", 16_000, 1),
    ("wav", "WAV", "PCM_24", 8_000, 2),
    ("wav", "WAV", "FLOAT", 16_000, 1),
    ("wav", "WAV", "PCM_U8", 8_000, 1),
    ("wav", "WAV", "IMA_ADPCM", 16_000, 1),
    ("wav", "WAVEX", "PCM_16", 44_100, 2),
    ("flac", "FLAC", "PCM_16", 16_000, 1),
    ("flac", "FLAC", "PCM_24", 44_100, 2),
    ("mp3", "MP3", "MPEG_LAYER_III", 16_000, 1),
    ("mp3", "MP3", "MPEG_LAYER_III", 44_100, 2),
    ("ogg", "OGG", "VORBIS", 16_000, 1),
    ("opus", "OGG", "OPUS", 48_000, 1),
)
_FOREIGN = ("AIFF", "AU", "AVR", "CAF", "HTK", "SVX", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "RF64", "SDS", "IRCAM",
            "VOC", "W64", "NIST", "XI")  # fmt: skip
_WORDS = tuple("a red blue small bird car tree house sings stands near the old quiet river".split())  # noqa: SIM905


@dataclass
class Piece:
    """One member of a shard to be: its name, content, and the header fields that differ from a plain file's."""

    name: str
    data: bytes
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    pax: dict[str, str] = field(default_factory=dict)


def image_bytes(rng: np.random.Generator, mode: str = "RGB", image_format: str = "PNG", **options) -> bytes:
    """A picture of noise, 12 to 32 pixels a side."""
    height, width = rng.integers(12, 32, 2)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, (height, width), dtype=np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def audio_bytes(rng: np.random.Generator, container: str, subtype: str, rate: int, channels: int = 1) -> bytes:
    """Noise of 0.05 to 0.25 s."""
    buffer = io.BytesIO()
    noise = 0.3 * rng.standard_normal((int(rate * rng.uniform(0.05, 0.25)), channels))
    soundfile.write(buffer, noise, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def text_bytes(rng: np.random.Generator) -> bytes:
    return " ".join(rng.choice(_WORDS, int(rng.integers(2, 14)))).encode()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _frames(rng: np.random.Generator, image_format: str) -> bytes:
    """Three pictures in one file."""
    frames = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _images(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    return [
        ("jpg", image_bytes(rng, "RGB", "JPEG")),
        ("jpg", image_bytes(rng, "RGB", "JPEG", progressive=True, exif=_exif(6))),
        ("jpeg", image_bytes(rng, "CMYK", "JPEG")),
        ("jpg", image_bytes(rng, "L", "JPEG", restart_marker_blocks=2)),
        ("jpg", _frames(rng, "MPO")),
        ("png", image_bytes(rng, "RGB")),
        ("png", image_bytes(rng, "RGBA")),
        ("png", image_bytes(rng, "P")),
        ("png", image_bytes(rng, "I;16")),
        ("png", image_bytes(rng, "1", exif=_exif(8))),
        ("png", _frames(rng, "PNG")),
        ("webp", image_bytes(rng, "RGB", "WEBP")),
        ("webp", image_bytes(rng, "RGBA", "WEBP", lossless=True, exif=_exif(5))),
        ("webp", _frames(rng, "WEBP")),
        ("jpg", image_bytes(rng, "P", "GIF")),  # another format under a mapped name
    ]


def chat_meta(siblings: list[tuple[str, str]]) -> dict:
    """A chat that names its siblings: (extension, kind) pairs."""
    asked = [{"type": kind, kind: name} for name, kind in siblings]
    return {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": [*asked, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A bird."}]},
        ]
    }


@lru_cache(maxsize=1)
def base_samples() -> tuple[Members, ...]:
    """Pairs, triples, text alone, chats with siblings and documents; the same in every process that forks off."""
    rng = np.random.default_rng(0)
    images, samples = _images(rng), []
    clips = [(ext, audio_bytes(rng, name, kind, rate, n)) for ext, name, kind, rate, n in _AUDIO]
    clips += [("wav", audio_bytes(rng, name, _subtype(name), 8_000)) for name in _FOREIGN]
    for number, (ext, data) in enumerate(images):
        meta = {"prompt": "near the river"} if number % 2 else {"group": number, "similarity": 0.3, "label": number % 3}
        samples.append({ext: data, "txt": text_bytes(rng), "json": json.dumps(meta).encode()})
    for number, (ext, data) in enumerate(clips):
        pictures = {images[number % len(images)][0]: images[number % len(images)][1]} if number % 3 == 0 else {}
        samples.append({ext: data, "txt": text_bytes(rng), **pictures})
    for number in range(6):
        (left, left_data), (clip, clip_data) = images[number], clips[number]
        named = [(f"0.{left}", "image"), (f"clip.{clip}", "audio")]
        meta = json.dumps(chat_meta(named)).encode()
        samples.append({f"0.{left}": left_data, f"clip.{clip}": clip_data, "json": meta})
    samples += [{"txt": text_bytes(rng)} for _ in range(4)]
    return tuple(samples)


def _subtype(container: str) -> str:
    return {"XI": "DPCM_16"}.get(container, "PCM_16")


def tar_bytes(pieces: list[Piece], layout: int) -> bytes:
    """A tar of the pieces, plain (USTAR/GNU) or with PAX records. layout: one of `tarfile`'s three formats."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout, errors="surrogateescape") as tar:
        for piece in pieces:
            info = tarfile.TarInfo(piece.name)
            info.type, info.linkname, info.size = piece.kind, piece.link, len(piece.data)
            info.mtime = 1.5 if layout == tarfile.PAX_FORMAT else 1  # a float needs a PAX record
            info.pax_headers = dict(piece.pax)
            try:
                tar.addfile(info, io.BytesIO(piece.data))
            except (ValueError, UnicodeError):  # this layout cannot hold such a name
                info.name, info.linkname, info.pax_headers = "x.txt", "", {}
                tar.addfile(info, io.BytesIO(piece.data))
    return buffer.getvalue()
