"""The shards that the data benchmark reads: 512 x 384 JPEG, 5 s of speech at 16 kHz, a caption of some 64 tokens.

Pictures are crops of scikit-learn's two sample photographs, speech is that of the captcha package, captions are
stretches of Python's own documentation: all from installed packages, and the same in every run.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trichord.core.errors import DataError

SAMPLES_PER_SHARD = 64
_IMAGE_SIZE = (512, 384)
_RATE, _SECONDS = 16_000, 5
_NOISE = 12  # of 32,768: what a quiet room adds; without it FLAC would compress better than real recordings
_CAPTION_WORDS = 45
_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """Two sets of shards with the same samples, the clips as FLAC and as 16-bit WAV; kB: mean sizes of a member."""

    flac_shards: tuple[str, ...]
    wav_shards: tuple[str, ...]
    tokenizer: str
    num_samples: int
    image_kb: float
    flac_kb: float
    caption_tokens: float


def make_corpus(folder: Path, num_samples: int) -> Corpus:
    """Write the corpus into `folder`, or take the one that an earlier run has left there.

    Raises:
        DataError: the folder holds another corpus, or cannot be written.
    """
    record = folder / "corpus.json"
    if record.is_file():
        fields: dict[str, Any] = json.loads(record.read_text())
        if fields.pop("version", None) != _VERSION or fields["num_samples"] != num_samples:
            raise DataError(f"{folder} holds another corpus; remove it or choose another folder")
        for kind in ("flac_shards", "wav_shards"):
            fields[kind] = tuple(str(folder / Path(url).name) for url in fields[kind])
        fields["tokenizer"] = str(folder / "tokenizer")
        return Corpus(**fields)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        corpus = _write_corpus(folder, num_samples)
        record.write_text(json.dumps(asdict(corpus) | {"version": _VERSION}))
    except OSError as error:
        raise DataError(f"the corpus cannot be written to {folder}: {error.strerror or error}") from error
    return corpus


def _write_corpus(folder: Path, num_samples: int) -> Corpus:
    from trichord.batches.tokenizer import train_tokenizer

    captions = list(_captions(num_samples))
    tokenizer = train_tokenizer(captions, "bpe", 4000, folder / "tokenizer")
    samples = list(zip(_photographs(num_samples), _clips(num_samples), captions))
    shards: dict[str, list[str]] = {"flac": [], "wav": []}
    sizes = np.zeros(2)
    for start in range(0, num_samples, SAMPLES_PER_SHARD):
        for kind, urls in shards.items():
            url = folder / f"{kind}-{start // SAMPLES_PER_SHARD:04d}.tar"
            urls.append(str(url))
            with tarfile.open(url, "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, (jpeg, clip, caption) in enumerate(samples[start : start + SAMPLES_PER_SHARD], start):
                    audio = _encode_clip(clip, kind)
                    add_member(tar, f"{number:06d}.jpg", jpeg)
                    add_member(tar, f"{number:06d}.{kind}", audio)
                    add_member(tar, f"{number:06d}.txt", caption.encode())
                    sizes += (len(jpeg), len(audio)) if kind == "flac" else 0
    image_kb, flac_kb = sizes / num_samples / 1000
    tokens = float(np.mean([len(tokenizer.encode(caption)) for caption in captions]))
    flacs, wavs = tuple(shards["flac"]), tuple(shards["wav"])
    return Corpus(flacs, wavs, str(folder / "tokenizer"), num_samples, float(image_kb), float(flac_kb), tokens)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _photographs(count: int) -> Iterator[bytes]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width = int(rng.integers(480, 560))
        height = width * 3 // 4
        left = int(rng.integers(0, photograph.width - width))
        upper = int(rng.integers(0, photograph.height - height))
        box = (left, upper, left + width, upper + height)
        picture = photograph.resize(_IMAGE_SIZE, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=96 if number % 2 else 92)
        yield buffer.getvalue()


def _clips(count: int) -> Iterator[np.ndarray]:
    import captcha
    import soundfile
    import soxr

    folder = Path(captcha.__file__).parent / "data"
    spoken = [soundfile.read(path, dtype="float32") for path in sorted(folder.glob("*/default.wav"))]
    words = [soxr.resample(samples, rate, _RATE) * 32768 for samples, rate in spoken]
    rng = np.random.default_rng(1)
    for _ in range(count):
        clip = np.zeros(0, np.float32)
        while len(clip) < _RATE * _SECONDS:
            pause = np.zeros(int(rng.integers(500, 3000)), np.float32)
            clip = np.concatenate([clip, words[rng.integers(len(words))], pause])
        clip = clip[: _RATE * _SECONDS] + _NOISE * rng.standard_normal(_RATE * _SECONDS)
        yield np.rint(clip).clip(-32768, 32767).astype(np.int16)


def _encode_clip(clip: np.ndarray, kind: str) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, clip, _RATE, format=kind.upper(), subtype="PCM_16")
    return buffer.getvalue()


def documentation_words() -> list[str]:
    """The words of Python's own documentation, in order."""
    from pydoc_data.topics import topics

    return " ".join(text for _, text in sorted(topics.items())).split()


def _captions(count: int) -> Iterator[str]:
    words = documentation_words()
    rng = np.random.default_rng(2)
    for _ in range(count):
        start = int(rng.integers(0, len(words) - _CAPTION_WORDS))
        yield " ".join(words[start : start + _CAPTION_WORDS])
