"""Log-mel features of a batch, against torch.stft clip by clip."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord_kernels import log_mel
from trichord_kernels.bench.timing import bench_row, median_ms
from trichord_kernels.mel import mel_filterbank


def rows(device: torch.device, repeats: int) -> list[dict]:
    return [bench_log_mel(device, repeats)]


def bench_log_mel(device: torch.device, repeats: int) -> dict:
    """A batch of uneven clips against the same arithmetic clip by clip."""
    lengths = [160_000, 96_000, 40_123, 16_000]
    waveforms = torch.rand(len(lengths), max(lengths), device=device) - 0.5
    window, bank = torch.hann_window(400, device=device), mel_filterbank().to(device)

    def plain() -> list[Tensor]:
        features = []
        for waveform, length in zip(waveforms, lengths):
            spectrum = torch.stft(waveform[:length], 400, 160, window=window, return_complex=True)[:, :-1]
            log_power = (bank @ spectrum.abs().square()).clamp_min(1e-10).log10()
            features.append((torch.maximum(log_power, log_power.max() - 8.0) + 4.0) / 4.0)
        return features

    times = median_ms(lambda: log_mel(waveforms, lengths), plain, device, repeats)
    return bench_row("log_mel", waveforms, times, num_bytes=4 * sum(lengths) + 4 * 80 * sum(n // 160 for n in lengths))
