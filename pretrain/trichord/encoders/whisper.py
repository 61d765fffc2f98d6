"""The transformers Whisper encoder at a clip's own length.

transformers refuses anything but 30 s, as Whisper was trained on clips padded with silence. Here positions are
sliced to the clip's length and attention is masked to it; at 3,000 frames the result equals transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from trichord.core.errors import ConfigError
from trichord.encoders.config import AudioEncoderConfig
from trichord.encoders.padding import key_mask, length_mask


def whisper_config(config: AudioEncoderConfig) -> WhisperConfig:
    """Our leaf as a WhisperConfig; with `weights`, the checkpoint's own numbers, checked against the leaf.

    Raises:
        ConfigError: the checkpoint has other sizes than configured, or is no Whisper.
    """
    sizes = {
        "d_model": config.hidden_size,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "num_mel_bins": config.mel.n_mels,
        # Not in the leaf, and the same in every Whisper; an export is built again from the leaf alone.
        "encoder_ffn_dim": 4 * config.hidden_size,
        "max_source_positions": 1500,
        "activation_function": "gelu",
        "scale_embedding": False,
    }
    if config.weights is None:
        return _without_dropout(WhisperConfig(**sizes))
    if not (Path(config.weights) / "config.json").is_file():
        raise ConfigError(
            f"encoders.audio.weights: expected a transformers Whisper folder, no config.json in {config.weights}"
        )
    released = WhisperConfig.from_pretrained(config.weights)
    wrong = {key: (getattr(released, key), value) for key, value in sizes.items() if getattr(released, key) != value}
    if wrong:
        text = ", ".join(f"{key} is {theirs} there and {ours} here" for key, (theirs, ours) in wrong.items())
        raise ConfigError(f"encoders.audio does not fit {config.weights}: {text}; set the checkpoint's sizes")
    return _without_dropout(released)


def _without_dropout(config: WhisperConfig) -> WhisperConfig:
    config.dropout = config.attention_dropout = config.activation_dropout = config.encoder_layerdrop = 0.0
    config._attn_implementation = "sdpa"
    return config


class OwnLengthWhisperEncoder(WhisperEncoder):
    """`WhisperEncoder` for clips of any length up to its positions. Same parameters, same names."""

    @property
    def max_frames(self) -> int:
        return self.max_source_positions * self.conv2.stride[0]

    def forward(self, features_AFM: Tensor, frames: Sequence[int], tokens: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Log-mel (A, F, M), 0 past each clip's end, and the clips' host lengths -> (A, L, D)."""
        hidden = F.gelu(self.conv1(features_AFM))
        # See MelTransformer: keep the convolutions of a padded clip equal to those of the clip alone.
        hidden = hidden * length_mask(frames, hidden.shape[-1], hidden.device)[:, None]
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
        mask = key_mask(tokens, hidden.shape[1], hidden.device)
        if mask is not None:
            mask = mask.expand(-1, 1, hidden.shape[1], -1)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.layer_norm(hidden)
