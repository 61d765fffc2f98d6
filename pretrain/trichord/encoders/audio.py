"""Audio towers: waveforms -> log-mel on the device, or by the workers -> feature tokens; each clip at its length.

Shapes: A clips, N samples, F mel bins, M frames of the longest clip, L audio tokens of the longest clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trichord.core.errors import ConfigError
from trichord.encoders.config import AudioEncoderConfig
from trichord.encoders.lengths import audio_tokens, mel_frames
from trichord.encoders.padding import key_mask, length_mask
from trichord.encoders.transformer import Transformer, sinusoids
from trichord.encoders.weights import load_into, needs_no_weights, read_safetensors
from trichord.encoders.whisper import OwnLengthWhisperEncoder, whisper_config
from trichord.layers.constants import HostConstant
from trichord.samples.config import AudioConfig
from trichord_kernels import log_mel


class MelTransformer(nn.Module):
    """Two convolutions over log-mel frames (Whisper's stem, any stride), sinusoidal positions, a small transformer."""

    def __init__(self, config: AudioEncoderConfig, max_tokens: int):
        super().__init__()
        width, stride = config.hidden_size, config.stride
        self.conv1 = nn.Conv1d(config.mel.n_mels, width, kernel_size=3, padding=1)
        # kernel 2s - 1 and padding s - 1 give ceil(M / s) tokens and read every frame
        self.conv2 = nn.Conv1d(width, width, kernel_size=2 * stride - 1, stride=stride, padding=stride - 1)
        self.transformer = Transformer(width, config.num_layers, config.num_heads)
        self.positions = HostConstant(sinusoids(max_tokens, width))

    def forward(self, features_AFM: Tensor, frames: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Log-mel (A, F, M), 0 past each clip's end, and the clips' host lengths -> (A, L, D)."""
        hidden = F.gelu(self.conv1(features_AFM))
        # The first convolution smears the last frame one step past the clip's end; alone, that step would be padding.
        hidden = hidden * length_mask(frames, hidden.shape[-1], hidden.device)[:, None]
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        positions = self.positions.on(hidden.device)[: hidden.shape[1]]
        return self.transformer(hidden + positions.to(hidden.dtype), key_mask(tokens, hidden.shape[1], hidden.device))


class AudioTower(nn.Module):
    """Waveforms -> feature tokens. A clip's features depend on the clip alone, never on what it is batched with."""

    def __init__(self, config: AudioEncoderConfig, audio: AudioConfig):
        super().__init__()
        self.config = config
        self.sample_rate = audio.sample_rate
        max_samples = int(audio.max_seconds * audio.sample_rate)
        self.hidden_size = config.hidden_size
        if config.kind == "whisper":
            self.encoder = _build_whisper(config, mel_frames(config, max_samples))
        else:
            self.encoder = MelTransformer(config, audio_tokens(config, max_samples))

    def count_tokens(self, offsets: Sequence[int]) -> list[int]:
        """Tokens of each clip, from the clips' A + 1 offsets into the waveforms."""
        return [audio_tokens(self.config, end - start) for start, end in itertools.pairwise(offsets)]

    def count_mel_tokens(self, mel_offsets: Sequence[int]) -> list[int]:
        """Tokens of each clip, from the clips' A + 1 offsets into log-mel frames."""
        return [-(-(end - start) // self.config.stride) for start, end in itertools.pairwise(mel_offsets)]

    def forward(
        self,
        waveforms: Tensor,
        offsets: Sequence[int],
        log_mels: Tensor | None = None,
        mel_offsets: Sequence[int] | None = None,
    ) -> Tensor:
        """Feature tokens (A, L, D) of clips laid end to end, garbage past a clip's end.

        waveforms (N,) int16; offsets: A + 1 host ints. Where workers computed log-mel, these are not looked at but
        log_mels (M, F) float32 and mel_offsets, A + 1 host ints.
        """
        if log_mels is not None and mel_offsets is not None:
            frames = [end - start for start, end in itertools.pairwise(mel_offsets)]
            features = pad_sequence(list(log_mels.split(frames)), batch_first=True).transpose(1, 2)
            tokens = self.count_mel_tokens(mel_offsets)
        else:
            lengths = [end - start for start, end in itertools.pairwise(offsets)]
            features = self._log_mel(waveforms, lengths)
            frames = [mel_frames(self.config, length) for length in lengths]
            tokens = self.count_tokens(offsets)
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(features.to(dtype), frames, tokens)

    def _log_mel(self, waveforms: Tensor, lengths: Sequence[int]) -> Tensor:
        """(A, F, M) float32 of clips laid end to end, on their device."""
        padded = pad_sequence(list(waveforms.split(list(lengths))), batch_first=True).float() / 32768.0
        mel = self.config.mel
        return log_mel(
            padded, lengths, sample_rate=self.sample_rate, n_mels=mel.n_mels, n_fft=mel.n_fft, hop_length=mel.hop_length
        )

    def placeholder(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """A short silence, waveform and offsets, for a micro-batch without audio."""
        length = self.config.mel.hop_length * self.config.stride
        return torch.zeros(length, dtype=torch.int16, device=device), [0, length]


def _build_whisper(config: AudioEncoderConfig, max_frames: int) -> OwnLengthWhisperEncoder:
    encoder = OwnLengthWhisperEncoder(whisper_config(config))
    if max_frames > encoder.max_frames:
        raise ConfigError(
            f"samples.audio.max_seconds allows {max_frames} mel frames, but Whisper has positions for "
            f"{encoder.max_frames}; lower it to {encoder.max_frames * config.mel.hop_length} samples"
        )
    if config.weights and not needs_no_weights(encoder):
        load_into(encoder, read_safetensors(config.weights).renamed(_encoder_name), config.weights)
    return encoder


def _encoder_name(key: str) -> str | None:
    """A key of a Whisper checkpoint as the encoder calls it; None for the decoder's."""
    return key.split("encoder.", 1)[1] if key.startswith(("model.encoder.", "encoder.")) else None
