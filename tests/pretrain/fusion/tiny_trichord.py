"""A Trichord small enough for tests, and hand-made packed batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trichord.batches.interleave import fill_segment, plan_segment
from trichord.batches.packed_batch import IGNORE_INDEX, SLACK_SEGMENT, PackedBatch
from trichord.encoders.config import AudioEncoderConfig, EncodersConfig, MelConfig, TextEncoderConfig, VisionConfig
from trichord.encoders.lengths import audio_tokens
from trichord.fusion.config import FusionConfig, TrunkConfig
from trichord.fusion.model import Trichord, build_model
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ContrastiveConfig, NextTokenConfig, ObjectivesConfig
from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig

VOCAB_SIZE = 50
SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "image_id": 4, "audio_id": 5}
GRID = (3, 3)
IMAGE_SIZE = 24
SAMPLES = SamplesConfig(image=ImageConfig(size=IMAGE_SIZE), audio=AudioConfig(max_seconds=1.0))
VISION = VisionConfig(
    name="vit_tiny_patch16_224", options={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
AUDIO = AudioEncoderConfig(hidden_size=32, num_layers=2, num_heads=2, mel=MelConfig(n_mels=20), stride=4)
TEXT = TextEncoderConfig(hidden_size=32, num_layers=2, num_heads=2, max_tokens=16)
ENCODERS = EncodersConfig(vision=VISION, audio=AUDIO, text=TEXT)
TRUNK = TrunkConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12)
FUSION = FusionConfig(trunk=TRUNK)
OBJECTIVES = ObjectivesConfig(next_token=NextTokenConfig(), contrastive=ContrastiveConfig(embed_dim=16))


def tiny_model(
    encoders: EncodersConfig = ENCODERS, fusion: FusionConfig = FUSION, objectives: ObjectivesConfig = OBJECTIVES
) -> Trichord:
    """Always the same weights for the same config; larger than the usual ones, so that mistakes show."""
    torch.manual_seed(0)
    model = build_model(encoders, fusion, objectives, SAMPLES, LayersConfig(), VOCAB_SIZE, SPECIAL)
    if not any(p.is_meta for p in model.parameters()):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed_positions" not in name:
                    parameter.normal_(0.0, 0.15)
    return model


@dataclass(frozen=True)
class Item:
    """One sample: an image or not, audio of so many samples or not, so many text tokens or no text (None)."""

    image: bool = False
    audio: int | None = None
    text: int | None = 4
    prompt: int = 0
    seed: int = 0

    def pixels(self) -> torch.Tensor:
        generator = np.random.default_rng([self.seed, 1])
        return torch.from_numpy(generator.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))

    def waveform(self) -> torch.Tensor:
        generator = np.random.default_rng([self.seed, 2])
        return torch.from_numpy(generator.integers(-9000, 9000, self.audio or 0).astype(np.int16))

    def tokens(self, count: int, what: int) -> np.ndarray:
        return np.random.default_rng([self.seed, what]).integers(6, VOCAB_SIZE, count)


@dataclass
class _Stream:
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    length: int = 0

    def add(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.columns.setdefault(name, []).append(array)
        self.length += arrays["input_ids"].shape[0]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(self.columns[name], axis=-1)).to(dtype)


def tiny_batch(items: Sequence[Item], num_tokens: int = 96) -> PackedBatch:
    """The items packed one after another into `num_tokens`, the rest slack."""
    stream, bounds, spans = _Stream(), [0], {"image": [], "audio": [], "text": []}
    owners: dict[str, list[int]] = {"image": [], "audio": []}
    for number, item in enumerate(items):
        clip_tokens = None if item.audio is None else audio_tokens(AUDIO, item.audio)
        layout = plan_segment(GRID if item.image else None, clip_tokens, item.prompt, item.text)
        ids = {name: SPECIAL[name] for name in ("bos_id", "eos_id", "image_id", "audio_id")}
        arrays = fill_segment(layout, item.tokens(item.prompt, 3), item.tokens(item.text or 0, 4), **ids)
        start = stream.length
        stream.add(
            input_ids=arrays.input_ids,
            labels=arrays.labels,
            positions=arrays.positions,
            span_kind=arrays.span_kind,
            span_ends=arrays.span_ends + start,
            segment_ids=np.full(layout.length, number),
        )
        bounds.append(stream.length)
        for name, present in (("image", item.image), ("audio", item.audio is not None)):
            if present:
                spans[name].append([start + x for x in getattr(layout, name)])
                owners[name].append(number)
        spans["text"].append([start + x for x in layout.text])
    if stream.length < num_tokens:
        bounds.append(num_tokens)
        _add_slack(stream, num_tokens - stream.length)
    return _assemble(items, stream, bounds, spans, owners)


def _add_slack(stream: _Stream, count: int) -> None:
    stream.add(
        input_ids=np.full(count, SPECIAL["pad_id"]),
        labels=np.full(count, IGNORE_INDEX),
        positions=np.zeros((3, count), dtype=np.float32),
        span_kind=np.zeros(count, dtype=np.int8),
        span_ends=np.arange(stream.length + 1, stream.length + count + 1),
        segment_ids=np.full(count, SLACK_SEGMENT),
    )


def _assemble(items, stream, bounds, spans, owners) -> PackedBatch:
    def pairs(name: str) -> torch.Tensor:
        return torch.tensor(spans[name], dtype=torch.int32).reshape(-1, 2)

    def index(name: str) -> torch.Tensor:
        return torch.tensor([t for start, end in spans[name] for t in range(start, end)], dtype=torch.int64)

    def sizes(name: str) -> tuple[int, ...]:
        return tuple(end - start for start, end in spans[name])

    labels = stream.tensor("labels", torch.int64)
    label_index = (labels != IGNORE_INDEX).nonzero()[:, 0]
    images = [item.pixels() for item in items if item.image]
    clips = [item.waveform() for item in items if item.audio is not None]
    batch = PackedBatch(
        input_ids=stream.tensor("input_ids", torch.int64),
        labels=labels,
        label_index=label_index,
        position_ids=stream.tensor("positions", torch.float32),
        segment_ids=stream.tensor("segment_ids", torch.int32),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        span_kind=stream.tensor("span_kind", torch.int8),
        span_ends=stream.tensor("span_ends", torch.int32),
        pixels=torch.stack(images) if images else torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
        image_spans=pairs("image"),
        image_segments=torch.tensor(owners["image"], dtype=torch.int64),
        image_index=index("image"),
        waveforms=torch.cat(clips) if clips else torch.zeros(0, dtype=torch.int16),
        audio_spans=pairs("audio"),
        audio_segments=torch.tensor(owners["audio"], dtype=torch.int64),
        audio_index=index("audio"),
        text_spans=pairs("text"),
        group_ids=torch.arange(len(items)),
        sample_ids=torch.zeros(len(items), 3, dtype=torch.int64),
        bad_segments=torch.zeros(len(items), dtype=torch.bool),
        audio_offsets=tuple(np.cumsum([0] + [len(clip) for clip in clips]).tolist()),
        image_counts=sizes("image"),
        audio_counts=sizes("audio"),
        text_lengths=sizes("text"),
        num_segments=len(items),
        num_images=len(images),
        num_audios=len(clips),
        num_labels=label_index.shape[0],
        max_seqlen=max(np.diff(bounds).tolist(), default=0),
        useful_tokens=int((stream.tensor("segment_ids", torch.int32) >= 0).sum()),
    )
    batch.check()
    return batch
