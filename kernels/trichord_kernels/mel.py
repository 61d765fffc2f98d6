"""Log-mel spectrogram, Whisper's definition, for a padded batch of clips; plain torch on any device.

Shapes: B clips, N samples, F mel bins (`n_mels`), M frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONSTANTS: dict[tuple, Tensor] = {}  # filterbanks and windows, by device and parameters


def num_mel_frames(num_samples: int, hop_length: int = 160) -> int:
    """Frames of a clip of `num_samples`: one per full hop, as Whisper (centred frames, the last one dropped).

    A clip shorter than one hop keeps one frame, where Whisper would leave none; an empty clip has 0.
    """
    if num_samples < 0 or hop_length < 1:
        raise ValueError(
            f"num_mel_frames: expected num_samples >= 0 and hop_length >= 1, got {num_samples=} {hop_length=}"
        )
    return max(num_samples // hop_length, min(num_samples, 1))


def log_mel(
    waveforms: Tensor,
    lengths: Sequence[int],
    *,
    sample_rate: int = 16000,
    n_mels: int = 80,
    n_fft: int = 400,
    hop_length: int = 160,
) -> Tensor:
    """Log-mel features of each clip, independent of its padding and of the other clips.

    waveforms (B, N) float32 in [-1, 1], clip b in the first `lengths[b]` samples, anything (NaN too) after them;
    lengths: B host integers. Returns (B, n_mels, M) float32 with M = max(num_mel_frames(lengths)); frames past a
    clip's own are exactly 0. Per clip: periodic Hann window, reflect padding of n_fft/2 at the clip's own ends (a
    clip too short to reflect once is reflected repeatedly, like numpy.pad), power spectrum, Slaney mel bins, log10
    floored at 1e-10, then floored at the clip's own maximum - 8, then (x + 4) / 4.

    Never waits for the device. Runs in float32 under autocast too. Raises ValueError for operands that do not fit.
    """
    _check(waveforms, lengths, n_fft)
    frames = [num_mel_frames(n, hop_length) for n in lengths]
    num_frames = max(frames, default=0)
    device = waveforms.device
    if num_frames == 0:
        return waveforms.new_zeros(len(lengths), n_mels, 0)
    with torch.autocast(device.type, enabled=False):
        padded = _reflect_ends(waveforms, _to_device(lengths, device), n_fft // 2)
        window = _cached(("hann", n_fft, device), lambda: torch.hann_window(n_fft), device)
        span = (num_frames - 1) * hop_length + n_fft
        spectrum = torch.stft(
            padded[:, :span], n_fft, hop_length, window=window, center=False, return_complex=True
        )  # (B, n_fft/2+1, M)
        power = spectrum.real.square() + spectrum.imag.square()
        bank = _cached(
            ("mel", sample_rate, n_fft, n_mels, device), lambda: mel_filterbank(sample_rate, n_fft, n_mels), device
        )
        log_power = (bank @ power).clamp_min(1e-10).log10()  # (B, F, M)
    own = (torch.arange(num_frames, device=device) < _to_device(frames, device)[:, None])[:, None]  # (B, 1, M)
    loudest = log_power.masked_fill(~own, float("-inf")).amax(dim=(1, 2), keepdim=True)
    scaled = (torch.maximum(log_power, loudest - 8.0) + 4.0) / 4.0
    return scaled.masked_fill(~own, 0.0)


def mel_filterbank(sample_rate: int = 16000, n_fft: int = 400, n_mels: int = 80) -> Tensor:
    """Slaney mel filters (n_mels, n_fft/2+1) float32 on the CPU: triangles from 0 Hz to Nyquist, each of unit area."""
    top = _hz_to_mel(torch.tensor(sample_rate / 2.0, dtype=torch.float64)).item()
    edges = _mel_to_hz(torch.linspace(0.0, top, n_mels + 2, dtype=torch.float64))  # (F + 2,) in Hz
    bins = torch.linspace(0.0, sample_rate / 2.0, n_fft // 2 + 1, dtype=torch.float64)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clamp_min(0.0)
    return (triangles * (2.0 / (upper - lower))).float()


# Slaney's scale: linear (200/3 Hz per mel) below 1 kHz = mel 15, then 27 mel per factor of 6.4.
_BREAK_HZ, _BREAK_MEL, _MEL_PER_LOG = 1000.0, 15.0, 27.0 / torch.tensor(6.4, dtype=torch.float64).log().item()


def _hz_to_mel(hz: Tensor) -> Tensor:
    log_part = _BREAK_MEL + (hz.clamp_min(_BREAK_HZ) / _BREAK_HZ).log() * _MEL_PER_LOG
    return torch.where(hz < _BREAK_HZ, hz * 3.0 / 200.0, log_part)


def _mel_to_hz(mel: Tensor) -> Tensor:
    log_part = _BREAK_HZ * ((mel - _BREAK_MEL) / _MEL_PER_LOG).exp()
    return torch.where(mel < _BREAK_MEL, mel * 200.0 / 3.0, log_part)


def _reflect_ends(waveforms: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """(B, N) -> (B, N + 2 pad): each clip reflected about its own first and last sample."""
    padded = F.pad(waveforms, (pad, pad))
    steps = torch.arange(pad, device=waveforms.device)
    before = (steps - pad).expand(len(lengths), -1)  # sample numbers -pad .. -1
    after = lengths[:, None] + steps  # sample numbers n .. n + pad - 1
    for where in (before, after):
        padded.scatter_(1, where + pad, waveforms.gather(1, _reflected(where, lengths[:, None])))
    return padded


def _reflected(position: Tensor, length: Tensor) -> Tensor:
    """Sample number a position outside the clip stands for: a triangle wave of period 2 (n - 1)."""
    period = (2 * (length - 1)).clamp_min(1)
    phase = position.remainder(period)
    return torch.minimum(phase, period - phase).minimum((length - 1).clamp_min(0))


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    host = torch.tensor(list(values), dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _cached(key: tuple, build, device: torch.device) -> Tensor:
    """A constant by key. Only real tensors are kept: one made under a fake-tensor mode must not outlive it."""
    if key not in _CONSTANTS:
        with torch.inference_mode(False):
            host = build()
            value = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
        if type(value) is not torch.Tensor:
            return value
        _CONSTANTS[key] = value
    return _CONSTANTS[key]


def _check(waveforms: Tensor, lengths: Sequence[int], n_fft: int) -> None:
    if waveforms.dim() != 2 or waveforms.dtype != torch.float32:
        raise ValueError(
            f"log_mel: expected waveforms (B, N) float32, got {tuple(waveforms.shape)} {waveforms.dtype}; "
            "divide int16 audio by 32768 and pad the clips to one length"
        )
    if n_fft % 2:
        raise ValueError(f"log_mel: expected an even n_fft, got {n_fft}")
    num_clips, num_samples = waveforms.shape
    if len(lengths) != num_clips or not all(0 <= n <= num_samples for n in lengths):
        raise ValueError(
            f"log_mel: expected {num_clips} lengths between 0 and {num_samples}, got {list(lengths)}; "
            "lengths are the clips' own sample counts before padding"
        )
