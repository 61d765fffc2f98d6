"""The data of the proof: three sources of small samples, some bad by their header and some only when decoded."""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.loader import ItemLengths
from trichord.batches.tokenizer import train_tokenizer
from trichord.inspection.fuzz.corpus import audio_bytes, image_bytes, text_bytes
from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig, TextConfig
from trichord.samples.generators import numpy_generator
from trichord.shards.config import ShardsConfig, SourceConfig

ROWS_PER_STEP = 24  # a multiple of every world size in the proof
LENGTHS = ItemLengths(image=lambda width, height: (2, 2), audio=lambda samples: 1 + samples // 1600)
_SOURCES = (
    # name, share of the samples, epochs, weight
    ("texts", 0.70, 1, 5.0),
    ("pictures", 0.18, 1, 2.0),
    ("sounds", 0.12, 2, 2.0),
)
_BAD_EVERY = 97
_SHARD_SAMPLES = 2_500


@dataclass(frozen=True)
class Mixture:
    """Configs, and what is to come out of them: by source, the numbers of good and bad samples, and the epochs."""

    shards: ShardsConfig
    samples: SamplesConfig
    batches: BatchesConfig
    good: list[np.ndarray]
    bad: list[np.ndarray]
    epochs: list[int]

    @property
    def num_samples(self) -> int:
        return sum(len(good) + len(bad) for good, bad in zip(self.good, self.bad))

    @property
    def num_good_draws(self) -> int:
        return sum(len(good) * epochs for good, epochs in zip(self.good, self.epochs))

    @property
    def num_bad_draws(self) -> int:
        return sum(len(bad) * epochs for bad, epochs in zip(self.bad, self.epochs))


def build_mixture(folder: Path, num_samples: int, seed: int) -> Mixture:
    """Write the shards and a tokenizer below `folder`."""
    rng = numpy_generator(seed, "selftest", "mixture")
    texts = [text_bytes(rng) for _ in range(2000)]
    train_tokenizer((text.decode() for text in texts), "bpe", 300, folder / "tokenizer")
    sources, good, bad, epochs = [], [], [], []
    for name, share, times, weight in _SOURCES:
        count = round(num_samples * share)
        flawed = _write_source(folder, name, count, texts, rng)
        good.append(np.flatnonzero(~flawed))
        bad.append(np.flatnonzero(flawed))
        epochs.append(times)
        schedule = ((40, 3.0), (120, 1.0)) if name == "sounds" else ()
        shards = (str(folder / f"{name}-*.tar"),)
        sources.append(SourceConfig(name=name, shards=shards, weight=weight, weight_schedule=schedule, epochs=times))
    return Mixture(
        ShardsConfig(sources=tuple(sources), window_samples=64),
        SamplesConfig(image=ImageConfig(size=8), audio=AudioConfig(gain_db=3), text=TextConfig(max_chars=1000)),
        BatchesConfig(tokenizer=str(folder / "tokenizer"), rows_per_step=ROWS_PER_STEP, micro_rows=2, row_tokens=64),
        good,
        bad,
        epochs,
    )


def _write_source(folder: Path, name: str, count: int, texts: list[bytes], rng: np.random.Generator) -> np.ndarray:
    """Write the shards of one source; returns which samples are bad (count,) bool."""
    flawed = np.zeros(count, dtype=bool)
    flawed[rng.permutation(count)[: -(-count // _BAD_EVERY)]] = True
    pictures = [image_bytes(rng, "RGB") for _ in range(50)]
    sounds = [audio_bytes(rng, "WAV", "PCM_16", 16_000) for _ in range(50)]
    for first in range(0, count, _SHARD_SAMPLES):
        with tarfile.open(folder / f"{name}-{first // _SHARD_SAMPLES:04d}.tar", "w") as tar:
            for number in range(first, min(first + _SHARD_SAMPLES, count)):
                members = {"txt": texts[int(rng.integers(len(texts)))]}
                if name == "pictures":
                    members["png"] = pictures[number % len(pictures)]
                elif name == "sounds":
                    members["wav"] = sounds[number % len(sounds)]
                if flawed[number]:
                    members |= _flaw(name, members, late=flawed[:number].sum() % 2 == 0)
                for ext, data in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return flawed


def _flaw(name: str, members: dict[str, bytes], late: bool) -> dict[str, bytes]:
    """A member that is bad by its header, or one whose header is right (`late`): texts are always read early."""
    if name == "pictures" and late:
        return {"png": _broken_pixels(members["png"])}
    if name == "sounds" and late:
        return {"wav": _not_finite(members["wav"])}
    return {"txt": b"caf\xe9"} if late else {"txt": b"\xff\xfe"}


def _broken_pixels(png: bytes) -> bytes:
    """The picture with noise for pixels, in a chunk whose checksum is right."""
    at = png.index(b"IDAT")
    size = int.from_bytes(png[at - 4 : at], "big")
    body = b"IDAT" + bytes(range(256))[: min(size, 200)].ljust(size, b"\x55")
    return png[:at] + body + zlib.crc32(body).to_bytes(4, "big") + png[at + 8 + size :]


def _not_finite(wav: bytes) -> bytes:
    """The clip as 32-bit floats, one of which is no number."""
    frames = (len(wav) - 44) // 2
    samples = np.zeros(frames, dtype="<f4")
    samples[frames // 2] = np.nan
    rate = (16_000).to_bytes(4, "little")
    fmt = b"fmt \x10\0\0\0\x03\0\x01\0" + rate + (64_000).to_bytes(4, "little") + b"\x04\0\x20\0"
    body = b"WAVE" + fmt + b"data" + samples.nbytes.to_bytes(4, "little") + samples.tobytes()
    return b"RIFF" + len(body).to_bytes(4, "little") + body
