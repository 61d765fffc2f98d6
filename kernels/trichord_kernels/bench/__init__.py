"""Timings of every op: on a CPU of the reference path against plain torch, on a GPU of the Triton kernels.

The GPU path has not run on a GPU yet; rows from it say so until its figures stand in docs/log.md.
"""

from __future__ import annotations

import torch

from trichord_kernels.bench import log_mel, rms_norm

_OPS = (rms_norm, log_mel)


def bench_kernels(device: str | torch.device = "cpu", repeats: int = 20) -> list[dict]:
    """Time each op on `device`; `repeats` runs each after two warm-up runs, median reported.

    Returns JSON-able rows: kernel, shape, dtype, device, backend, time_ms, torch_ms, speedup (torch_ms / time_ms),
    gb_per_s (the least bytes the op must move, per second), note.
    """
    return [row for op in _OPS for row in op.rows(torch.device(device), repeats)]
