"""The bars a row of the static report is held to. docs/kernels/static.md says why each is what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.limits import LIMITS, SMALL_SHARED_KIB, TENSOR_MEMORY_COLUMNS
from trichord_kernels.static.machine_code import CodeCount, KernelCode

SPILLS_ALLOWED = {"sm_80": 64}  # bytes per thread outside the hot loop; none elsewhere


def judged_bars(case: StaticCase, arch: str) -> list[str]:
    """The bars that apply. AMD code is judged by the first (row kernels) or the first and the third (matmuls)."""
    if arch.startswith("gfx"):
        return ["1", "3"] if case.matmul else ["1"]
    bars = ["1", "2", *(["3"] if case.matmul else []), "4", *(["5"] if case.needs_odd_width else []), "6"]
    bars += ["7"] if case.matmul and case.head_dim is not None else []
    return bars + (["8"] if case.row_bytes is not None else [])


def failed_bars(case: StaticCase, arch: str, code: KernelCode, row: dict) -> dict[str, str]:
    """{bar: what was expected and found} for every bar that applies and does not hold."""
    found = {
        "1": _fits(case, arch, code, row),
        "2": _spills(case, arch, code),
        "3": _tensor_cores(arch, code),
        "4": _widths(case, code),
        "6": _shared_memory(case, arch, row),
        "7": _mask_code(code.hot),
        "8": _row_bytes(case, row),
    }
    found["5"] = found["4"] and f"rows of a multiple of 8, strides passed: {found['4']}"
    return {bar: found[bar] for bar in judged_bars(case, arch) if found[bar]}


def add_small_twins(rows: Sequence[dict]) -> None:
    """Bar 6 across rows: a matmul above 99 KiB needs a row `<name>.small` on the same architecture that is not."""
    small = {
        (row["kernel"], row["arch"])
        for row in rows
        if row.get("shared_kib", SMALL_SHARED_KIB + 1) <= SMALL_SHARED_KIB and row["bars"].get("1") == "pass"
    }
    for row in rows:
        needs_twin = row.get("tensor_core") and "6" in row["bars"] and row["shared_kib"] > SMALL_SHARED_KIB
        if needs_twin and (f"{row['kernel']}.small", row["arch"]) not in small:
            row["bars"]["6"] = "fail"
            why = f"bar 6: {row['shared_kib']} KiB, and no case {row['kernel']}.small within {SMALL_SHARED_KIB} KiB"
            row["reported" if row["is_reported"] else "failures"].append(why)


def _fits(case: StaticCase, arch: str, code: KernelCode, row: dict) -> str:
    if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        return f"compiles, but needs {row['tensor_memory_columns']} of {TENSOR_MEMORY_COLUMNS} tensor memory columns"
    if row["occupancy"] == 0:
        return (
            f"compiles, but {case.num_warps} warps of {code.registers} registers and {row['shared_kib']} KiB of shared "
            f"memory do not fit on {arch}"
        )
    return ""


def _spills(case: StaticCase, arch: str, code: KernelCode) -> str:
    """sm_100 matmuls may spill outside their hot loop, where it costs little; everything else as SPILLS_ALLOWED."""
    in_loop = code.hot.spill_bytes if case.matmul else code.loops.spill_bytes
    allowed = SPILLS_ALLOWED.get(arch, 0)
    if case.matmul and arch == "sm_100":
        return f"expected no spill bytes in the hot loop, got {in_loop}" if in_loop else ""
    if code.whole.spill_bytes > allowed or in_loop:
        return (
            f"expected at most {allowed} spill bytes and none in the loop, got {code.whole.spill_bytes} and {in_loop}"
        )
    return ""


def _tensor_cores(arch: str, code: KernelCode) -> str:
    wanted = LIMITS[arch].tensor_code
    kinds = ", ".join(sorted(code.whole.tensor_core)) or "none"
    if not any(re.fullmatch(wanted, kind) for kind in code.hot.tensor_core):
        return f"expected {wanted} in the hot loop, got {kinds} in the kernel"
    if arch == "sm_90" and "HMMA" in code.whole.tensor_core:
        return f"expected no HMMA beside HGMMA, got {code.whole.tensor_core['HMMA']}"
    return ""


def _widths(case: StaticCase, code: KernelCode) -> str:
    """Stores of a matmul come after its loop, and a few narrow ones (log-sum-exp, one per row) are right there."""
    loads = code.hot.loads
    if case.matmul:
        stores = code.whole.stores
        if loads.wide_share < 0.9 or stores.wide_byte_share < 0.9:
            share = f"{stores.wide_byte_share:.0%}"
            return f"expected 90 % of hot loads and of stored bytes in 128 bits, got {loads} loads, {share} of stores"
        return ""
    stores = code.hot.stores
    if loads.wide_share < 0.9 or stores.wide_share < 1.0:
        return f"expected 90 % of loads and all stores of 128 bits, got {loads} loads, {stores} stores"
    return ""


def _shared_memory(case: StaticCase, arch: str, row: dict) -> str:
    limit = LIMITS[arch].program_shared_kib
    if not case.matmul or case.name.endswith(".small"):
        limit = min(limit, SMALL_SHARED_KIB)
    if row["shared_kib"] > limit:
        return f"expected at most {limit} KiB of shared memory, got {row['shared_kib']}"
    return ""


def _mask_code(loop: CodeCount) -> str:
    """A mask compares positions and selects per score, and there is one exponential per score: the full-tile loop may
    have half a compare and half a select per exponential, for its own end and its pipeline's."""
    allowed = loop.exponentials / 2
    if loop.compares > allowed or loop.selects > allowed:
        return (
            f"expected a full-tile loop without mask code, got {loop.compares} compares and {loop.selects} selects for "
            f"{loop.exponentials} exponentials per thread"
        )
    return ""


def _row_bytes(case: StaticCase, row: dict) -> str:
    if case.row_bytes is None:
        return ""
    if not 0 <= row["extra_bytes"] <= case.shared_bytes:
        return (
            f"expected {case.row_bytes} bytes per tile (and up to {case.shared_bytes} of weight), "
            f"got {case.row_bytes + row['extra_bytes']}"
        )
    if case.is_forward and row["occupancy"] < 0.5:
        return f"expected occupancy of at least 0.5 in the forward, got {row['occupancy']}"
    return ""
