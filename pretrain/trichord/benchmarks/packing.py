"""`trichord bench packing`: the share of row tokens that is useful, as the loader packs, and as others do.

Shards of samples whose captions have the lengths of Conceptual 12M (Changpinyo et al. 2021, table 2: 20.2 words on
average, standard deviation 16.3; drawn from a log-normal of these moments) are planned by the loader's own planner, row
by row until the epoch ends. Nothing is decoded.
"""

from __future__ import annotations

import math
import tarfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trichord.batches.config import BatchesConfig
from trichord.batches.dealing import RowLayout
from trichord.batches.loader_state import LaneCursor
from trichord.batches.order import lane_planner
from trichord.batches.step_planner import StepPlanner
from trichord.batches.tokenizer import load_tokenizer, train_tokenizer
from trichord.batches.windows import ItemLengths, PlannedSample, SamplePlanner
from trichord.benchmarks.data_corpus import add_member, documentation_words
from trichord.samples.config import AudioConfig, SamplesConfig
from trichord.shards.config import ShardsConfig, SourceConfig
from trichord.shards.reader import open_sources

_MEAN_WORDS, _SD_WORDS = 20.2, 16.3
_SEED = 7
_SAMPLES_PER_SHARD = 2000
_RATE = 1000


@dataclass(frozen=True)
class Case:
    """A model's rows. image_tokens: per image; audio_tokens_per_s: per second of a clip of 1 to 10 s; 0: none."""

    name: str
    image_tokens: int
    audio_tokens_per_s: int
    row_tokens: int


CASES = (
    Case("captions", 0, 0, 2048),
    Case("image of 256 tokens + caption", 256, 0, 4096),
    Case("image of 256 tokens + caption", 256, 0, 8192),
    Case("image of 64 tokens + caption", 64, 0, 2048),
    Case("image of 256 + speech of 1 to 10 s (25 tokens/s) + caption", 256, 25, 8192),
)


def bench_packing(folder: Path, num_samples: int = 10_000, window_samples: int = 256) -> list[dict[str, Any]]:
    """One row per case: the share of useful tokens as planned by the loader, as concatenated in random order without
    planning, and as padded to the longest of every 32 samples."""
    url = _write_shards(folder, num_samples)
    return [_measure(case, folder, url, window_samples) for case in CASES]


def _measure(case: Case, folder: Path, url: str, window_samples: int) -> dict[str, Any]:
    rows = [[sample.length for sample in row] for row in _rows(case, folder, url, window_samples)]
    lengths = [length for row in rows for length in row]
    unplanned = [lengths[i] for i in np.random.default_rng(_SEED).permutation(len(lengths))]
    return {
        "stream": case.name,
        "samples": len(lengths),
        "mean tokens": sum(lengths) / len(lengths),
        "row tokens": case.row_tokens,
        "planned": sum(lengths) / (len(rows) * case.row_tokens),
        "in order": sum(lengths) / (_rows_in_order(unplanned, case.row_tokens) * case.row_tokens),
        "padded": sum(lengths) / _padded_tokens(unplanned),
    }


def _rows(case: Case, folder: Path, url: str, window_samples: int) -> Iterator[Sequence[PlannedSample]]:
    """The planned rows of one epoch, in one lane."""
    source = SourceConfig(name="captions", shards=(url,), epochs=1)
    shards = ShardsConfig(sources=(source,), window_samples=window_samples)
    batches = BatchesConfig(
        tokenizer=str(folder / "tokenizer"), rows_per_step=1, row_tokens=case.row_tokens, max_samples_per_row=1024
    )
    lengths = ItemLengths(
        image=(lambda width, height: (1, case.image_tokens)) if case.image_tokens else None,
        audio=(lambda samples: case.audio_tokens_per_s * samples // _RATE) if case.audio_tokens_per_s else None,
    )
    samples = SamplesConfig(audio=AudioConfig(sample_rate=_RATE))
    tokenizer = load_tokenizer(batches.tokenizer)
    planner = SamplePlanner(open_sources(shards), samples, batches, tokenizer, lengths, shards.max_member_bytes)
    order = lane_planner(shards, planner, _SEED)
    cursors = {0: LaneCursor(order.first_state(0))}
    for step in StepPlanner(order, planner, _SEED, RowLayout(batches, 0, 1), cursors, 0).steps():
        if step.rows[0]:
            yield step.rows[0]
        if step.cursors[0].exhausted:
            return


def _rows_in_order(lengths: Sequence[int], row_tokens: int) -> int:
    """Rows of a stream packer that puts each sample into the current row, or opens the next."""
    rows, free = 0, 0
    for length in lengths:
        if length > free:
            rows, free = rows + 1, row_tokens
        free -= length
    return rows


def _padded_tokens(lengths: Sequence[int], batch: int = 32) -> int:
    chunks = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    return sum(max(chunk) * len(chunk) for chunk in chunks)


def _write_shards(folder: Path, num_samples: int) -> str:
    """Captions with a picture of a few pixels and a clip of 1 to 10 s at 1 kHz: small, and as long as real ones."""
    rng = np.random.default_rng(_SEED)
    texts = list(ragged_captions(num_samples, rng))
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, "bpe", 8000, folder / "tokenizer")
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for start in range(0, num_samples, _SAMPLES_PER_SHARD):
        with tarfile.open(folder / f"captions-{start // _SAMPLES_PER_SHARD:04d}.tar", "w") as tar:
            for number, text in enumerate(texts[start : start + _SAMPLES_PER_SHARD], start):
                add_member(tar, f"{number:06d}.txt", text.encode())
                add_member(tar, f"{number:06d}.png", picture.getvalue())
                add_member(tar, f"{number:06d}.wav", _silence(int(rng.integers(_RATE, 10 * _RATE))))
    return str(folder / "captions-*.tar")


def ragged_captions(count: int, rng: np.random.Generator) -> Iterator[str]:
    """Texts with Conceptual 12M's spread of lengths in words."""
    words = documentation_words()
    variance = math.log(1 + (_SD_WORDS / _MEAN_WORDS) ** 2)
    lengths = np.exp(rng.normal(math.log(_MEAN_WORDS) - variance / 2, math.sqrt(variance), count))
    for length in np.clip(np.rint(lengths), 1, 400).astype(int):
        at = int(rng.integers(len(words) - length))
        yield " ".join(words[at : at + length])


def _silence(frames: int) -> bytes:
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(_RATE)
        file.writeframes(b"\x80" * frames)
    return buffer.getvalue()
