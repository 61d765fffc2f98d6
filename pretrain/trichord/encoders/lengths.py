"""How many tokens an item becomes: plain functions of the config, for planning rows before anything is decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trichord.core.errors import ConfigError
from trichord.encoders.config import AudioEncoderConfig, EncodersConfig, VisionConfig

if TYPE_CHECKING:
    from trichord.batches.windows import ItemLengths

_GRIDS: dict[tuple[str, int], tuple[int, int]] = {}


def image_grid(config: VisionConfig, image_size: int) -> tuple[int, int]:
    """Rows and columns of patch tokens of an image of `image_size` x `image_size` pixels.

    Asks timm for the model on the meta device (no memory, some 0.1 s); the answer is remembered.

    Raises:
        ConfigError: unknown model or options, no grid of patch tokens, or patches that do not fill the image.
    """
    key = (config.model_dump_json(), image_size)
    if key not in _GRIDS:
        import torch

        from trichord.encoders.vision import create_backbone, patch_grid

        with torch.device("meta"):
            _GRIDS[key] = patch_grid(create_backbone(config, image_size), config, image_size)
    return _GRIDS[key]


def tower_lengths(encoders: EncodersConfig, image_size: int, streamed: bool) -> ItemLengths:
    """How many tokens an image or a clip becomes: what the batches room has to know of the encoders.

    streamed: whether there is a trunk. Without one there is no stream to be in: items go to their towers only.
    """
    from trichord.batches.windows import ItemLengths  # imports torch

    vision, audio = encoders.vision, encoders.audio
    grid = image_grid(vision, image_size) if vision is not None and streamed else (0, 0)
    return ItemLengths(
        image=(lambda width, height: grid) if vision is not None else None,
        audio=(lambda samples: audio_tokens(audio, samples) if streamed else 0) if audio is not None else None,
    )


def known_grids() -> dict[tuple[str, int], tuple[int, int]]:
    """What `image_grid` has answered here, for `remember_grids` of another process."""
    return dict(_GRIDS)


def remember_grids(grids: dict[tuple[str, int], tuple[int, int]]) -> None:
    """Take over what another process has found out: asking timm takes the seconds of its import."""
    _GRIDS.update(grids)


def mel_frames(config: AudioEncoderConfig, num_samples: int) -> int:
    """Log-mel frames of a clip of `num_samples` at the model's rate: one per full hop, at least one."""
    if num_samples < 1:
        raise ConfigError(f"an audio clip needs at least one sample, got {num_samples}; leave empty clips out")
    return max(1, num_samples // config.mel.hop_length)


def audio_tokens(config: AudioEncoderConfig, num_samples: int) -> int:
    """Audio tokens of a clip of `num_samples` at the model's rate: one per `stride` frames, the last one shared."""
    return -(-mel_frames(config, num_samples) // config.stride)
