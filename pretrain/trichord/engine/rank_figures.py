"""Figures that each rank has of its own, a column per rank, so that one sum over ranks brings them all together."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist
from torch import Tensor

from trichord.batches.loader import StepStats
from trichord.core.memory import resident_bytes

_GIB = 2**30
NAMES = ("cost", "cost_undealt", "peak_gib", "reserved_gib", "host_gib", "workers_gib")


def rank_columns(stats: StepStats, device: torch.device) -> Tensor:
    """(len(NAMES), ranks) float64 on the host, 0 but for this rank's column. Memory: the largest so far of the device's
    allocator (on a CPU of the process) and what it holds; of the host now, data workers included, and these alone."""
    own, below = resident_bytes()
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _largest_resident_bytes()
    reserved = torch.cuda.max_memory_reserved(device) if on_gpu else 0
    values = [stats.cost, stats.cost_undealt, *(size / _GIB for size in (peak, reserved, own + below, below))]
    columns = torch.zeros(len(NAMES), dist.get_world_size(), dtype=torch.float64)
    columns[:, dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
    return columns


def figures_of_ranks(columns: Tensor) -> dict[str, float]:
    """Metrics from the sum of all ranks' columns: memory of the rank that has most, and how even the work was."""
    of = dict(zip(NAMES, columns.view(len(NAMES), -1)))
    line = {f"memory/{name}": float(of[name].max()) for name in NAMES if name.endswith("_gib")}
    line = {name: value for name, value in line.items() if value}  # not on this device, or not on this system
    return line | {
        "data/imbalance": _imbalance(of["cost"]),
        "data/imbalance_undealt": _imbalance(of["cost_undealt"]),
    }


def _imbalance(costs: Tensor) -> float:
    """The most loaded rank over the mean, by predicted cost; 1 is balance."""
    total = float(costs.sum())
    return float(costs.max()) * len(costs) / total if total else 1.0


def _largest_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
