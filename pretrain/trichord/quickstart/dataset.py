"""The quick-start's data: handwritten digits, spoken digits and letters, and their words, all real and all installed.

- scans: scikit-learn's `load_digits` (package BSD-3-Clause), 1,797 handwritten digits of 8 x 8 pixels in 17 grey
  levels. Stored as PNG with each pixel repeated 4 x 4: 32 x 32 is large enough to be looked at, and as nothing is
  interpolated, averaging 4 x 4 gives the original back.
- recordings: the `captcha` package's one recording of each of 0-9 and A-Z by one speaker (8 kHz, BSD-3-Clause), at
  16 kHz and 16 bit.
- words: `zero` to `nine`, `letter a` to `letter z`.

Only scans are held out. There is one recording of each sound, so what is measured on speech is recall. With more
voices (quickstart/voices.py) the digits of some speakers are trained on and those of others held out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from trichord.batches.tokenizer import train_tokenizer
from trichord.building.build import BuildRow, build_shards
from trichord.core.errors import ConfigError, DataError
from trichord.core.seed import derive_seed
from trichord.quickstart.voices import RATE as VOICE_RATE
from trichord.quickstart.voices import SpokenDigit
from trichord.shards.index import load_header
from trichord.shards.lanes import keyed_permutation

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RECORDING_NAMES = string.digits + string.ascii_uppercase
HELD_OUT_FRAC = 0.2
SCANS_ALONE_FRAC = 0.6
"""Of the training scans; the others come with the recording of their digit."""
SPEECH_COPIES = 10
HELD_OUT_SOURCES = ("scans-heldout", "voices-unseen")
RATE = 16_000  # Hz
SCALE = 4
SPLITS_FILE = "splits.json"
_FORMAT = "trichord-quickstart-2"
_SAMPLES_PER_SHARD = 256
_VOCABULARY = 64  # an upper bound: 37 words and 6 special tokens


@dataclass(frozen=True)
class Scan:
    """One handwritten digit. number: its place in load_digits; pixels: (8, 8) uint8, 0 is paper."""

    number: int
    digit: int
    pixels: np.ndarray


def build_quickstart_data(out_dir: Path, seed: int, voices: Sequence[SpokenDigit] = ()) -> dict[str, Any]:
    """Write `SOURCE-00000N.tar` with sidecars, `splits.json`, `texts.txt` and `tokenizer/` to `out_dir`.

    The same seed and package versions give the same bytes. A folder that holds exactly this is used again. `voices`
    adds their digits to `speech-train`, or, where unseen, to a source `voices-unseen` of their own; all are labelled
    with the English word of the digit, whatever the language.

    Returns:
        What `splits.json` holds: seed, packages, texts, and per source its shards with their hashes, how many samples,
        whether it is held out, and which scans and recordings are in it.

    Raises:
        ConfigError: the folder holds something else. DataError: an installed package lacks the data.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        return _reused(out_dir, seed, voices)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        splits = _write(partial, seed, voices)
        partial.rename(out_dir)  # also over an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return splits


def word_of(recording: str) -> str:
    """The text of a recording: `7` -> `seven`, `A` -> `letter a`, `carlo-it/7` -> `seven`."""
    recording = recording.rpartition("/")[2]
    return DIGIT_WORDS[int(recording)] if recording.isdigit() else f"letter {recording.lower()}"


def read_scans() -> list[Scan]:
    """All distinct scans of load_digits, in its order; a repeated image could stand on both sides of the split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans, seen = [], set()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target)):
        pixels = np.round(image * (255 / 16)).astype(np.uint8)
        if pixels.tobytes() not in seen:
            seen.add(pixels.tobytes())
            scans.append(Scan(number, int(digit), pixels))
    return scans


def read_recordings() -> dict[str, np.ndarray]:
    """Recordings by name (`0`-`9`, `A`-`Z`): int16 (n,) mono at `RATE`.

    Raises:
        DataError: the captcha package lacks one.
    """
    import soundfile
    from scipy.signal import resample_poly

    recordings = {}
    for name in RECORDING_NAMES:
        file = files("captcha") / "data" / name / "default.wav"
        if not file.is_file():
            raise DataError(f"the captcha package has no {file}; install captcha==0.7.1")
        samples, rate = soundfile.read(io.BytesIO(file.read_bytes()), dtype="float64")
        samples = resample_poly(samples, RATE, rate)
        recordings[name] = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    return recordings


def split_scans(scans: list[Scan], seed: int) -> dict[str, list[Scan]]:
    """Each digit's scans, shuffled by the seed, cut into held out, alone and paired; then each part shuffled."""
    parts: dict[str, list[Scan]] = {"scans-heldout": [], "scans-train": [], "pairs-train": []}
    for digit in range(10):
        own = _shuffled([scan for scan in scans if scan.digit == digit], seed, f"digit {digit}")
        held_out = round(HELD_OUT_FRAC * len(own))
        alone = held_out + round(SCANS_ALONE_FRAC * (len(own) - held_out))
        parts["scans-heldout"] += own[:held_out]
        parts["scans-train"] += own[held_out:alone]
        parts["pairs-train"] += own[alone:]
    return {name: _shuffled(part, seed, name) for name, part in parts.items()}


def _write(folder: Path, seed: int, voices: Sequence[SpokenDigit]) -> dict[str, Any]:
    recordings = read_recordings()
    sounds = {name: _wav(samples) for name, samples in recordings.items()}
    parts = split_scans(read_scans(), seed)
    clips = _voice_clips(voices)
    sounds |= {name: clip for name, (clip, _) in clips.items()}
    seen = [*RECORDING_NAMES, *(name for name, (_, unseen) in clips.items() if not unseen)]
    digits, copies = list(string.digits), _shuffled(seen * SPEECH_COPIES, seed, "speech-train")
    rows = {
        "scans-train": _scan_rows(parts["scans-train"], {}),
        "pairs-train": _scan_rows(parts["pairs-train"], sounds),
        "speech-train": _speech_rows(copies, sounds),
        "scans-heldout": _scan_rows(parts["scans-heldout"], {}),
        "gallery": _speech_rows(digits, sounds),
        "speech-known": _speech_rows(list(RECORDING_NAMES), sounds),
    }
    used: dict[str, list[str]] = {
        "pairs-train": digits,
        "speech-train": seen,
        "gallery": digits,
        "speech-known": list(RECORDING_NAMES),
    }
    unseen = [name for name, (_, held_out) in clips.items() if held_out]
    if unseen:
        rows["voices-unseen"], used["voices-unseen"] = _speech_rows(unseen, sounds), unseen
    sources = {}
    for name, source_rows in rows.items():
        shards = [Path(path) for path in build_shards(source_rows, folder, name, _SAMPLES_PER_SHARD, even=False)]
        sources[name] = {
            "held_out": name in HELD_OUT_SOURCES,
            "samples": _count_samples(shards),
            "scans": sorted(scan.number for scan in parts.get(name, [])),
            "recordings": used.get(name, []),
            "shards": {path.name: _sha256(path) for path in shards},
        }
    texts = [word_of(name) for name in RECORDING_NAMES]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    train_tokenizer(texts, "word", _VOCABULARY, folder / "tokenizer")
    packages = {name: version(name) for name in ("scikit-learn", "captcha")}
    splits = {"format": _FORMAT, "seed": seed, "packages": packages, "texts": texts, "sources": sources}
    splits["voices"] = _speakers(voices)
    (folder / SPLITS_FILE).write_text(json.dumps(splits, indent=1) + "\n")
    return splits


def _scan_rows(scans: list[Scan], sounds: dict[str, bytes]) -> Iterator[BuildRow]:
    """Image and text per scan, with the digit's recording where `sounds` are given."""
    for scan in scans:
        word = DIGIT_WORDS[scan.digit]
        members: dict[str, bytes | Path] = {"png": _png(scan.pixels), "txt": word.encode()}
        meta: dict[str, Any] = {"digit": scan.digit, "scan": scan.number}
        if sounds:
            members["wav"] = sounds[str(scan.digit)]
            meta["recording"] = str(scan.digit)
        yield BuildRow(f"scan-{scan.number:04d}", {**members, "json": json.dumps(meta).encode()})


def _speech_rows(names: list[str], sounds: dict[str, bytes]) -> Iterator[BuildRow]:
    for place, name in enumerate(names):
        meta = json.dumps({"recording": name}).encode()
        yield BuildRow(
            f"speech-{place:04d}-{name.replace('/', '-')}",
            {"wav": sounds[name], "txt": word_of(name).encode(), "json": meta},
        )


def _voice_clips(voices: Sequence[SpokenDigit]) -> dict[str, tuple[bytes, bool]]:
    """`SPEAKER/DIGIT` -> (WAV bytes at `RATE`, unseen)."""
    from scipy.signal import resample_poly

    clips = {}
    for clip in voices:
        samples = np.clip(np.round(resample_poly(clip.waveform, RATE, VOICE_RATE) * 32767), -32768, 32767)
        clips[f"{clip.speaker}/{clip.digit}"] = (_wav(samples.astype(np.int16)), clip.unseen)
    return clips


def _speakers(voices: Sequence[SpokenDigit]) -> dict[str, list[str]]:
    """Names of the speakers trained on and of the unseen ones."""
    return {
        "trained": sorted({clip.speaker for clip in voices if not clip.unseen}),
        "unseen": sorted({clip.speaker for clip in voices if clip.unseen}),
    }


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _shuffled(items: list[Any], seed: int, purpose: str) -> list[Any]:
    return [items[place] for place in keyed_permutation(len(items), derive_seed(seed, "quickstart", purpose))]


def _count_samples(shards: list[Path]) -> int:
    return sum(load_header(str(path)).num_samples for path in shards)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reused(out_dir: Path, seed: int, voices: Sequence[SpokenDigit]) -> dict[str, Any]:
    """What a finished earlier call left in the folder, if nothing of it has changed."""
    try:
        splits = json.loads((out_dir / SPLITS_FILE).read_text())
        same = (splits["format"], splits["seed"], splits["voices"]) == (_FORMAT, seed, _speakers(voices)) and all(
            _sha256(out_dir / name) == digest
            for source in splits["sources"].values()
            for name, digest in source["shards"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same, splits = False, {}
    if not same:
        raise ConfigError(
            f"{out_dir} is not empty and does not hold the quick-start's data for seed {seed} and these voices; remove "
            f"it (rm -r {out_dir}) or choose another folder"
        )
    return splits
