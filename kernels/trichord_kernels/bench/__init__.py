"""Timings of every op: on a CPU of the reference path against plain torch, on a GPU of the Triton kernels.

The GPU path has not run on a GPU yet; rows from it say so until its figures stand in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trichord_kernels.bench import (
    attention,
    contrastive_loss,
    fuse_modalities,
    linear_cross_entropy,
    log_mel,
    merge_embeddings,
    rms_norm,
    rope,
)
from trichord_kernels.errors import KernelError

_OPS = (rms_norm, attention, linear_cross_entropy, contrastive_loss, fuse_modalities, merge_embeddings, rope, log_mel)
_BY_NAME = {op.__name__.rpartition(".")[2]: op for op in _OPS}


def op_names() -> tuple[str, ...]:
    return tuple(_BY_NAME)


def bench_kernels(
    device: str | torch.device = "cpu", repeats: int = 20, ops: Sequence[str] | None = None
) -> list[dict]:
    """Time each of `ops` (default: all) on `device`; `repeats` runs each after two warm-up runs, median reported.

    Returns JSON-able rows: kernel, shape, dtype, device, backend, time_ms, torch_ms, speedup (torch_ms / time_ms),
    gb_per_s (the least bytes the op must move, per second), note. On a GPU, too: tflop_per_s of ops that are bound by
    arithmetic, ceiling (what of the ceiling measured in the same run it reaches), peak_mib, and a row per contestant.
    Raises KernelError for an unknown op.
    """
    if unknown := sorted(set(ops or ()) - set(op_names())):
        raise KernelError(f"bench: expected ops out of {', '.join(op_names())}, got {', '.join(unknown)}")
    return [row for op in ops or op_names() for row in _BY_NAME[op].rows(torch.device(device), repeats)]
