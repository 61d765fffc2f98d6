"""How much of the tensor cores' peak a loop can reach by its instruction mix: at best, and if nothing overlaps.

Per iteration of one program of W warps on one multiprocessor, in cycles:

    tensor  = FLOPs that the tensor-core opcodes make / peak FLOPs per cycle
    useful  = FLOPs that the algorithm asks for       / peak FLOPs per cycle   (less where head dims are padded)
    issue   = instructions of a warp x W / 4          4 schedulers, each issues one warp instruction per cycle
    special = MUFU instructions of a warp x W x 2     16 lanes: a warp instruction holds them for 2 cycles
    other   = max(issue, special)

    tensor_bound = useful / max(tensor, other)        everything overlaps
    serial_bound = useful / (tensor + other)          nothing overlaps

Both ignore memory, shared-memory conflicts, latencies and barriers, so they rank variants and are no speeds. Rates:
CUDA C++ Programming Guide, "Throughput of native arithmetic instructions" (16 special functions per clock cycle and
multiprocessor), and limits.py for the tensor peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from trichord_kernels.static.limits import LIMITS
from trichord_kernels.static.machine_code import CodeCount

SCHEDULERS = 4
SPECIAL_LANES = 16


@dataclass(frozen=True)
class Bounds:
    tensor_bound: float
    serial_bound: float


def loop_bounds(arch: str, num_warps: int, loop: CodeCount, flops_per_iteration: int | None) -> Bounds | None:
    """Both bounds of one loop; None where the opcodes do not say what they compute (sm_100, gfx942).

    flops_per_iteration: what one pass of the loop as written asks for; None takes what is executed. A loop that the
    compiler has unrolled executes whole multiples of it (padding alone stays below twice).
    """
    peak = LIMITS[arch].tensor_flops
    executed = loop.tensor_flops * num_warps
    if peak is None or not executed:
        return None
    passes = max(1, executed // flops_per_iteration) if flops_per_iteration else 1
    useful = (flops_per_iteration or executed) * passes / peak
    tensor = executed / peak
    issue = loop.instructions * num_warps / SCHEDULERS
    special = loop.mufu * num_warps * LIMITS[arch].warp_size / SPECIAL_LANES
    other = max(issue, special)
    return Bounds(round(useful / max(tensor, other), 3), round(useful / (tensor + other), 3))
