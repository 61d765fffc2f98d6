"""What one multiprocessor (NVIDIA SM, AMD compute unit) of each judged architecture holds, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass

SMALL_SHARED_KIB = 99  # what consumer parts (sm_86, sm_89, sm_120) offer one program
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor; no other has tensor memory


@dataclass(frozen=True)
class ArchLimits:
    """Registers are 32-bit, allocated to a thread in whole granules. Shared memory in KiB; `system_shared_kib` is taken
    from every program's share. tensor_code matches the tensor-core opcodes a kernel must use. tensor_flops: of half
    precision, dense, per cycle and multiprocessor; None where opcodes do not state their shapes."""

    warp_size: int
    max_warps: int
    max_programs: int
    max_program_warps: int
    registers: int
    register_granule: int
    shared_kib: int
    program_shared_kib: int
    system_shared_kib: int
    tensor_code: str
    tensor_flops: int | None


# Sizes: CUDA C++ Programming Guide, "Technical specifications per compute capability"; AMD CDNA 3 ISA guide.
# Tensor rates: 312 TF/s / (108 SMs x 1.41 GHz) of an A100, 989 TF/s / (132 SMs x 1.83 GHz) of an H100 SXM.
LIMITS = {
    "sm_80": ArchLimits(32, 64, 32, 32, 65536, 8, 164, 163, 1, "HMMA", 2048),
    "sm_90": ArchLimits(32, 64, 32, 32, 65536, 8, 228, 227, 1, "HGMMA", 4096),
    "sm_100": ArchLimits(32, 64, 32, 32, 65536, 8, 228, 227, 1, r"UTC\w*MMA", None),
    "gfx942": ArchLimits(64, 32, 32, 16, 131072, 8, 64, 64, 0, "v_mfma", None),
}


def occupancy(arch: str, num_warps: int, registers: int, shared_kib: float) -> float:
    """Estimated share of the warp slots that programs of this size fill: warp slots, registers, shared memory."""
    limits = LIMITS[arch]
    granule = limits.register_granule
    registers_per_warp = -(-max(registers, 1) // granule) * granule * limits.warp_size
    if num_warps > limits.max_program_warps or shared_kib > limits.program_shared_kib:
        return 0.0
    shared_per_program = shared_kib + limits.system_shared_kib
    programs = min(
        limits.max_programs,
        limits.max_warps // num_warps,
        limits.registers // registers_per_warp // num_warps,
        int(limits.shared_kib // shared_per_program) if shared_per_program else limits.max_programs,
    )
    return round(programs * num_warps / limits.max_warps, 2)
