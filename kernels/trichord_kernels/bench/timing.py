"""Times two ways to do the same in alternation, and makes a row of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trichord_kernels.dispatch import choose_backend

GPU_NOTE = "GPU path not yet proven on a GPU"


def median_ms(
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


def bench_row(kernel: str, x: Tensor, times: tuple[float, float], num_bytes: int) -> dict:
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
