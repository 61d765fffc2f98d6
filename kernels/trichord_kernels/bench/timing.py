"""Times two ways to do the same in alternation, and makes a row of it; what this GPU reaches at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trichord_kernels.dispatch import choose_backend

GPU_NOTE = "GPU path not yet proven on a GPU"

Run = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached a moment ago: a large bf16 matrix product, and a copy (bytes read plus bytes written)."""

    tflop_per_s: float
    gb_per_s: float


@cache
def ceilings(device: torch.device) -> Ceilings:
    """Measured once per process and device, about a second. GPUs only; not yet run on one."""
    size, copied_bytes = 8192, 2**30
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Ceilings(
        tflop_per_s=2 * size**3 / _gpu_ms(lambda: a @ b) / 1e9,
        gb_per_s=2 * copied_bytes / _gpu_ms(lambda: target.copy_(source)) / 1e6,
    )


def contestants(builders: Mapping[str, Callable[[], Run]]) -> tuple[dict[str, Run], dict[str, str]]:
    """(the runs that can be made here, why the others cannot): a builder imports what it needs and returns its run.

    contestants({"flash-attn": flash_attn_run})   # -> ({}, {"flash-attn": "No module named 'flash_attn'"})
    """
    runs, absent = {}, {}
    for name, build in builders.items():
        try:
            runs[name] = build()
        except ImportError as error:
            absent[name] = str(error)
    return runs, absent


def absent_row(kernel: str, name: str, why: str) -> dict:
    """A contestant that is not here is named, not left out in silence."""
    return {"kernel": kernel, "against": name, "note": f"absent: {why}"}


def median_ms(ours: Run, plain: Run, device: torch.device, repeats: int) -> tuple[float, float]:
    """Median times of both, run in turn so that a busy machine slows them alike."""
    if device.type == "cuda":
        return _gpu_ms(ours), _gpu_ms(plain)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for run, taken in zip((ours, plain), times):
            start = time.perf_counter()
            run()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def bench_row(kernel: str, x: Tensor, times: tuple[float, float], num_bytes: int, num_flops: int = 0) -> dict:
    """One row: x says shape, dtype and device; num_bytes the least that must move, num_flops those the work needs.

    On a GPU, ceiling_share is the larger of the shares of the measured copy and of the measured matrix product.
    """
    ours_ms, torch_ms = times
    on_gpu = x.device.type == "cuda"
    row = {
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
    if num_flops:
        row["tflop_per_s"] = round(num_flops / ours_ms / 1e9, 3)
    if on_gpu:
        best = ceilings(x.device)
        flop_share = num_flops / ours_ms / 1e9 / best.tflop_per_s
        row["ceiling_share"] = round(max(flop_share, num_bytes / ours_ms / 1e6 / best.gb_per_s), 3)
    return row


def _gpu_ms(run: Run) -> float:
    from triton.testing import do_bench  # clears the L2 cache between runs

    return float(do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]  untyped: a float
