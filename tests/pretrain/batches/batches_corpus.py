"""A small corpus of real tars, written by webdataset, with every mix of fields and every kind of bad sample."""

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from trichord.batches.config import BatchesConfig
from trichord.batches.loader import ItemLengths, Loader
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.tokenizer import train_tokenizer
from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig, TargetConfig, TextConfig
from trichord.shards.config import ShardsConfig, SourceConfig

WORDS = tuple("a red blue round small bird car tree house sings stands near the old new quiet loud river".split())  # noqa: SIM905
LENGTHS = ItemLengths(image=lambda width, height: (2, 3), audio=lambda samples: 1 + samples // 1600)
SAMPLES = SamplesConfig(
    image=ImageConfig(size=8, resize="random_resized_crop", min_crop_frac=0.4, rotate_degrees=10),
    audio=AudioConfig(max_seconds=1.0, gain_db=3, noise_db=-30, speed_frac=0.1),
    text=TextConfig(max_chars=600),
    targets={"group": TargetConfig(key="group", kind="number")},
)


class Canary:
    """Unpickling this writes a file: whoever reads a pickle is found out."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def image_bytes(rng, image_format="PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 255, (int(rng.integers(8, 24)), int(rng.integers(8, 24)), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def audio_bytes(rng, seconds=None, rate=16_000, container="WAV") -> bytes:
    buffer = io.BytesIO()
    frames = int((seconds if seconds is not None else rng.uniform(0.05, 0.4)) * rate)
    soundfile.write(buffer, 0.3 * rng.standard_normal(frames), rate, format=container, subtype="PCM_16")
    return buffer.getvalue()


def text_bytes(rng, words=None) -> bytes:
    return " ".join(rng.choice(WORDS, words or int(rng.integers(2, 12)))).encode()


def good_sample(rng, number: int) -> dict[str, bytes]:
    """Image + text, audio + text, all, text alone, image alone, audio alone, in turn; some with a prompt or a group."""
    kind = number % 6
    sample = {}
    if kind in (0, 2, 4):
        sample["png" if number % 4 else "jpg"] = image_bytes(rng, "PNG" if number % 4 else "JPEG")
    if kind in (1, 2, 5):
        sample["wav" if number % 4 else "flac"] = audio_bytes(
            rng, rate=(16_000, 8000)[number % 2], container="WAV" if number % 4 else "FLAC"
        )
    if kind < 4:
        sample["txt"] = text_bytes(rng)
    if number % 5 == 0:
        sample["json"] = json.dumps({"prompt": "near the river"} if number % 2 else {"group": number % 7}).encode()
    return sample


def talk(rng, number: int) -> dict[str, bytes]:
    """A chat or a document over two pictures and a clip."""
    said = text_bytes(rng, 25 if number % 4 == 3 else 4).decode()
    content = [
        {"type": "image", "image": "1.png"},
        {"type": "text", "text": said},
        {"type": "audio"},
        {"type": "image", "image": "0.jpg"},
    ]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": text_bytes(rng).decode()}]
    messages = [{"role": "document", "content": content}] if number % 2 else chat
    items = {"0.jpg": image_bytes(rng, "JPEG"), "1.png": image_bytes(rng), "2.wav": audio_bytes(rng)}
    return {**items, "json": json.dumps({"messages": messages, "group": number}).encode()}


def bad_samples(rng, canary: str) -> dict[str, dict[str, bytes]]:
    """By key: what is wrong. Keys starting with `late` turn out bad only when they are decoded; `long_row` is good, and
    longer than a row."""
    good, text = image_bytes(rng), text_bytes(rng)
    return {
        "bad_text": {"png": good, "txt": b"caf\xe9"},
        "bad_meta": {"png": good, "txt": text, "json": b"{"},
        "bad_long_text": {"txt": b"car " * 300},
        "long_row": {"txt": b"car " * 70},
        "bad_long_audio": {"wav": audio_bytes(rng, 1.5), "txt": text},
        "bad_image_is_a_pickle": {"jpg": pickle.dumps(Canary(canary)), "txt": text},
        "bad_chat_item": {"json": b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}'},
        "bad_target": {"txt": text, "json": b'{"group": "seven"}'},
        "late_chat": {
            "json": b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "0.png": break_png(good),
        },
        "bad_blank": {"txt": b"  \n"},
        "bad_nothing": {"pkl": pickle.dumps(Canary(canary)), "pth": pickle.dumps(Canary(canary)), "json": b"{}"},
        "late_image": {"png": break_png(good), "txt": text},
        "late_audio": {"flac": break_flac(audio_bytes(rng, 0.3, container="FLAC")), "txt": text},
    }


def break_png(data: bytes) -> bytes:
    """Same header, same length, unreadable pixels."""
    at = data.index(b"IDAT") + 4
    return data[: at + 8] + b"\0" * (len(data) - at - 8)


def break_flac(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2)


def write_shards(folder: Path, samples: list[tuple[str, dict[str, bytes]]], per_shard: int) -> str:
    from webdataset import ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(f"{folder}/part-%03d.tar", maxcount=per_shard, verbose=0, encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return f"{folder}/part-*.tar"


@dataclass(frozen=True)
class Corpus:
    """Two sources: `many` (all kinds, bad ones planted) and `few` (all good, its weight a third)."""

    root: Path
    tokenizer: str
    canary: Path
    num_many: int
    bad_keys: frozenset[str]
    num_few: int

    def shards(self, epochs=None, weights=(3.0, 1.0), window_samples=12) -> ShardsConfig:
        sources = tuple(
            SourceConfig(name=name, shards=(f"{self.root}/{name}/part-*.tar",), weight=weight, epochs=epochs)
            for name, weight in zip(("many", "few"), weights)
        )
        return ShardsConfig(sources=sources, window_samples=window_samples)

    def batches(self, **changes) -> BatchesConfig:
        options = {"rows_per_step": 5, "micro_rows": 1, "row_tokens": 64, "max_samples_per_row": 6}
        return BatchesConfig(tokenizer=self.tokenizer, **(options | changes))

    def loader(self, rank=0, world_size=1, state=None, epochs=None, augment=True, seed=7, **changes) -> Loader:
        return Loader(
            self.shards(epochs=epochs),
            SAMPLES,
            self.batches(**changes),
            seed=seed,
            lengths=LENGTHS,
            rank=rank,
            world_size=world_size,
            state=state,
            augment=augment,
        )


def build_corpus(root: Path) -> Corpus:
    rng = np.random.default_rng(0)
    canary = root / "canary"
    many = [(f"s{number:04d}", good_sample(rng, number)) for number in range(85)]
    for number in range(12):
        many.insert(5 * number, (f"t{number:03d}", talk(rng, number)))
    for place, (key, members) in enumerate(bad_samples(rng, str(canary)).items()):
        many.insert(3 + 9 * place, (key, members))
    write_shards(root / "many", many, per_shard=20)
    few = [(f"f{number:03d}", good_sample(rng, 6 * number)) for number in range(13)]
    write_shards(root / "few", few, per_shard=5)
    train_tokenizer([" ".join(WORDS)], "word", 64, root / "tokenizer")
    bad_keys = frozenset(key for key, _ in many if key.startswith(("bad", "late")))
    return Corpus(root, str(root / "tokenizer"), canary, len(many), bad_keys, len(few))


def row_contents(batch: PackedBatch, row: int, row_tokens: int) -> dict[str, np.ndarray]:
    """Everything a batch holds of one of its rows, counted from the row's start: equal on every split."""
    start = row * row_tokens
    stream = slice(start, start + row_tokens)
    # A segment's text starts at least one token ([BOS]) after the segment does, also where the text is empty.
    segments = np.flatnonzero((batch.text_spans[:, 0].numpy() - 1) // row_tokens == row)
    first = int(segments[0]) if len(segments) else 0
    ids = batch.segment_ids[stream].numpy()
    contents = {
        "input_ids": batch.input_ids[stream].numpy(),
        "labels": batch.labels[stream].numpy(),
        "position_ids": batch.position_ids[:, stream].numpy(),
        "span_kind": batch.span_kind[stream].numpy(),
        "span_ends": batch.span_ends[stream].numpy() - start,
        "segment_ids": np.where(ids < 0, ids, ids - first),
        "cu_seqlens": np.array([c - start for c in batch.cu_seqlens.tolist() if start <= c <= start + row_tokens]),
        "text_spans": batch.text_spans.numpy()[segments] - start,
        "group_ids": batch.group_ids.numpy()[segments],
        "targets": batch.targets.numpy()[segments],
        "target_present": batch.target_present.numpy()[segments],
        "sample_ids": batch.sample_ids.numpy()[segments],
        "bad_segments": batch.bad_segments.numpy()[segments],
    }
    images = np.flatnonzero(np.isin(batch.image_segments.numpy(), segments))
    clips = np.flatnonzero(np.isin(batch.audio_segments.numpy(), segments))
    offsets = batch.audio_offsets
    waves = [batch.waveforms[offsets[clip] : offsets[clip + 1]].numpy() for clip in clips]
    contents |= {
        "pixels": batch.pixels.numpy()[images],
        "image_spans": batch.image_spans.numpy()[images] - start,
        "image_segments": batch.image_segments.numpy()[images] - first,
        "audio_spans": batch.audio_spans.numpy()[clips] - start,
        "audio_segments": batch.audio_segments.numpy()[clips] - first,
        "audio_lengths": np.array([len(wave) for wave in waves]),
        "waveforms": np.concatenate(waves) if waves else np.zeros(0, np.int16),
    }
    return contents


def hash_row(batch: PackedBatch, row: int, row_tokens: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in row_contents(batch, row, row_tokens).items():
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
