"""A Trichord small enough for tests, and hand-made packed batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trichord.batches.collate import collate
from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import DecodedClip, RowFormat, build_row
from trichord.batches.windows import PlannedSample
from trichord.encoders.config import AudioEncoderConfig, EncodersConfig, MelConfig, TextEncoderConfig, VisionConfig
from trichord.encoders.lengths import audio_tokens
from trichord.fusion.config import FusionConfig, TrunkConfig
from trichord.fusion.model import Trichord, build_model
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ContrastiveConfig, NextTokenConfig, ObjectivesConfig
from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig
from trichord.shards.lanes import SampleRef

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


def tiny_parts(
    grid: tuple[int, int] | None, clip_tokens: int | None, prompt: Sequence[int], text: Sequence[int] | None
) -> tuple[StreamPart, ...]:
    """A segment of fields, as the loader lays it out."""
    parts = [StreamPart.text([SPECIAL["bos_id"]])]
    parts += [] if grid is None else [StreamPart.image(grid)]
    parts += [] if clip_tokens is None else [StreamPart.audio(clip_tokens)]
    parts += [StreamPart.text(prompt)] if len(prompt) else []
    if text is not None:
        parts += [StreamPart.text(text, learned=True, caption=True), StreamPart.text([SPECIAL["eos_id"]], learned=True)]
    return tuple(parts)


def tiny_batch(items: Sequence[Item], num_tokens: int = 96) -> PackedBatch:
    """The items packed one after another into `num_tokens`, the rest slack."""
    nothing = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool)
    planned, decoded = [], []
    for number, item in enumerate(items):
        clip_tokens = None if item.audio is None else audio_tokens(AUDIO, item.audio)
        text = None if item.text is None else item.tokens(item.text, 4)
        parts = tiny_parts(GRID if item.image else None, clip_tokens, item.tokens(item.prompt, 3), text)
        planned.append(PlannedSample(SampleRef(0, 0, 0), "key", "x.tar", parts, (), number, *nothing))
        clip = [] if item.audio is None else [DecodedClip(item.audio, waveform=item.waveform().numpy())]
        decoded.append(([item.pixels().numpy()] if item.image else []) + clip)
    length = max(num_tokens, sum(sample.length for sample in planned))
    ids = {name: SPECIAL[name] for name in ("pad_id", "image_id", "audio_id")}
    batch = collate([build_row(planned, decoded, RowFormat(length, IMAGE_SIZE, **ids))])
    batch.check()
    return batch
