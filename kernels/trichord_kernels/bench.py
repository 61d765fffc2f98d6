"""Timings of every op against plain torch: on a CPU of the reference path, on a GPU of the Triton kernels.

The GPU path has not run on a GPU yet; rows from it say so until its figures stand in docs/log.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels.dispatch import choose_backend, rms_norm
from trichord_kernels.mel import log_mel, mel_filterbank

GPU_NOTE = "GPU path not yet proven on a GPU"


def bench_kernels(device: str | torch.device = "cpu", repeats: int = 20) -> list[dict]:
    """Time each op on `device`; `repeats` runs each after two warm-up runs, median reported.

    Returns JSON-able rows: kernel, shape, dtype, device, backend, time_ms, torch_ms, speedup (torch_ms / time_ms),
    gb_per_s (the least bytes the op must move, per second), note.
    """
    device = torch.device(device)
    return [bench(device, repeats) for bench in (bench_rms_norm, bench_rms_norm_backward, bench_log_mel)]


def bench_rms_norm(device: torch.device, repeats: int) -> dict:
    """Residual add + norm, forward, against `x + residual` and torch's own rms_norm."""
    x, residual, weight = _rms_norm_inputs(device)

    def plain() -> Tensor:
        return F.rms_norm(x + residual, weight.shape, weight, 1e-6)

    with torch.no_grad():
        times = _median_ms(lambda: rms_norm(x, weight, residual=residual), plain, device, repeats)
    return _row("add_rms_norm_fwd", x, times, num_bytes=4 * x.nbytes)


def bench_rms_norm_backward(device: torch.device, repeats: int) -> dict:
    """Forward and backward of the residual add + norm with gradients of x, residual and weight."""
    x, residual, weight = (t.requires_grad_() for t in _rms_norm_inputs(device))
    grad = torch.randn_like(x)

    def ours() -> None:
        torch.autograd.grad(rms_norm(x, weight, residual=residual), (x, residual, weight), (grad, grad))

    def plain() -> None:
        h = x + residual
        out = F.rms_norm(h, weight.shape, weight, 1e-6)
        torch.autograd.grad((out, h), (x, residual, weight), (grad, grad))

    times = _median_ms(ours, plain, device, repeats)
    return _row("add_rms_norm_fwd_bwd", x, times, num_bytes=8 * x.nbytes)


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

    times = _median_ms(lambda: log_mel(waveforms, lengths), plain, device, repeats)
    return _row("log_mel", waveforms, times, num_bytes=4 * sum(lengths) + 4 * 80 * sum(n // 160 for n in lengths))


def _rms_norm_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = ((16384, 4096), torch.bfloat16) if device.type == "cuda" else ((1024, 1024), torch.float32)
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], device=device, dtype=dtype)


def _median_ms(
    ours: Callable[[], object], plain: Callable[[], object], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Median times of both, run in turn so that a busy machine slows them alike."""
    if device.type == "cuda":
        from triton.testing import do_bench  # clears the L2 cache between runs

        ours_ms, torch_ms = (do_bench(run, return_mode="median") for run in (ours, plain))
        return ours_ms, torch_ms  # pyright: ignore[reportReturnType]  do_bench is not typed; a median is a float
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for run, taken in zip((ours, plain), times):
            start = time.perf_counter()
            run()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def _row(kernel: str, x: Tensor, times: tuple[float, float], num_bytes: int) -> dict:
    ours_ms, torch_ms = times
    on_gpu = x.device.type == "cuda"
    return {
        "kernel": kernel,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(x.device) if on_gpu else x.device.type,
        "backend": "torch" if kernel == "log_mel" else choose_backend(x.device),
        "time_ms": round(ours_ms, 4),
        "torch_ms": round(torch_ms, 4),
        "speedup": round(torch_ms / ours_ms, 3),
        "gb_per_s": round(num_bytes / ours_ms / 1e6, 2),
        "note": GPU_NOTE if on_gpu else "reference path on a CPU",
    }
