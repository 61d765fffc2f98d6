"""The static judge: compile every kernel ahead of time, without a GPU, and hold its machine code to hard bars.

It shows that a kernel compiles for each architecture, does not spill, moves its rows in 128-bit accesses and fits.
It cannot show time, bandwidth or races: every row says "static, not timed". docs/kernels/static.md has the bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trichord_kernels.errors import KernelError
from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.cases import static_cases
from trichord_kernels.static.machine_code import CodeCount, read_amdgcn, read_cubin

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SMALL_SHARED_KIB = 99  # what consumer parts (sm_86, sm_89, sm_120) offer one program


@dataclass(frozen=True)
class ArchLimits:
    """What one multiprocessor (CU) holds. Registers are 32-bit, allocated to a thread in whole granules."""

    warp_size: int
    max_warps: int
    max_programs: int
    max_program_warps: int
    registers: int
    register_granule: int
    shared_kib: int
    program_shared_kib: int
    system_shared_kib: int  # taken from every program's share


_LIMITS = {
    "sm_80": ArchLimits(32, 64, 32, 32, 65536, 8, 164, 163, 1),
    "sm_90": ArchLimits(32, 64, 32, 32, 65536, 8, 228, 227, 1),
    "sm_100": ArchLimits(32, 64, 32, 32, 65536, 8, 228, 227, 1),
    "gfx942": ArchLimits(64, 32, 32, 16, 131072, 8, 64, 64, 0),
}


def static_report(archs: Sequence[str] | None = None, cases: Sequence[StaticCase] | None = None) -> list[dict]:
    """Compile each case for each architecture and judge it. Needs no GPU; about 0.3 s per row, cached by Triton.

    Returns JSON-able rows with: kernel, arch, num_warps, registers, spill_store_bytes, spill_load_bytes,
    loop_spill_bytes, shared_kib, occupancy (share of the warp slots), loads and stores ("wide/all" of the hot part),
    whole_loads, whole_stores, barriers, tensor_core, extra_bytes (moved per tile beyond the minimum), bars
    ({number: "pass" | "fail"}), failures (list of sentences), note. Raises KernelError for an unknown architecture or
    under the interpreter.
    """
    unknown = sorted(set(archs or ()) - set(ARCHS))
    if unknown:
        raise KernelError(f"static report: expected archs out of {', '.join(ARCHS)}, got {', '.join(unknown)}")
    return [
        judge_case(case, arch) for arch in archs or ARCHS for case in (static_cases(arch) if cases is None else cases)
    ]


def judge_case(case: StaticCase, arch: str) -> dict[str, Any]:
    """One row of the report. A case that does not compile is a row that fails bar 1, not an exception."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    head = {"kernel": case.name, "arch": arch, "num_warps": case.num_warps, "note": "static, not timed"}
    try:
        compiled = compile_case(case, arch)
    except (CompilationError, PTXASError, RuntimeError) as error:
        return {**head, "bars": {"1": "fail"}, "failures": [f"bar 1: does not compile: {error}"]}
    code = read_amdgcn(compiled.asm["amdgcn"]) if arch.startswith("gfx") else read_cubin(compiled.asm["cubin"])
    shared_kib = round(compiled.metadata.shared / 1024, 2)
    threads = case.num_warps * _LIMITS[arch].warp_size
    row = {
        **head,
        "registers": code.registers,
        "spill_store_bytes": code.spill_store_bytes,
        "spill_load_bytes": code.spill_load_bytes,
        "loop_spill_bytes": code.loop_spill_bytes,
        "shared_kib": shared_kib,
        "occupancy": occupancy(arch, case.num_warps, code.registers, shared_kib),
        "loads": str(code.hot_loads),
        "stores": str(code.hot_stores),
        "whole_loads": str(code.loads),
        "whole_stores": str(code.stores),
        "barriers": code.barriers,
        "tensor_core": code.tensor_core,
        "extra_bytes": threads * (code.hot_loads.thread_bytes + code.hot_stores.thread_bytes) - (case.row_bytes or 0),
    }
    failures = {} if arch.startswith("gfx") else _failed_bars(case, arch, code, row)
    if row["occupancy"] == 0:
        failures["1"] = f"compiles, but {case.num_warps} warps of {code.registers} registers do not fit on {arch}"
    judged = ["1"] if arch.startswith("gfx") else ["1", "2", "4", *(["5"] if case.needs_odd_width else []), "6", "8"]
    row["bars"] = {bar: "fail" if bar in failures else "pass" for bar in judged}
    row["failures"] = [f"bar {bar}: {why}" for bar, why in failures.items()]
    return row


def compile_case(case: StaticCase, arch: str) -> Any:
    """triton.compile for `arch` (a compiled kernel with `.asm` and `.metadata`); raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise KernelError("static report: the kernels were imported under the interpreter; unset TRITON_INTERPRET")
    limits = _LIMITS[arch]
    target = GPUTarget("hip", arch, limits.warp_size)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), limits.warp_size)
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    return triton.compile(source, target=target, options=options)


def occupancy(arch: str, num_warps: int, registers: int, shared_kib: float) -> float:
    """Estimated share of the warp slots that programs of this size fill: warp slots, registers, shared memory."""
    limits = _LIMITS[arch]
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


def _failed_bars(case: StaticCase, arch: str, code: CodeCount, row: dict[str, Any]) -> dict[str, str]:
    """{bar: what was expected and found} for the hard bars of a row kernel on an NVIDIA target."""
    failed = {}
    spilled, allowed = code.spill_store_bytes + code.spill_load_bytes, 64 if arch == "sm_80" else 0
    if spilled > allowed or code.loop_spill_bytes:
        failed["2"] = (
            f"expected at most {allowed} spill bytes and none in the loop, got {spilled} and {code.loop_spill_bytes}"
        )
    loads, stores = code.hot_loads, code.hot_stores
    if loads.wide_share < 0.9 or stores.wide_share < 1.0:
        failed["4"] = f"expected 90 % of loads and all stores of 128 bits, got {loads} loads, {stores} stores"
        if case.needs_odd_width:
            failed["5"] = f"rows of a multiple of 8, strides passed: {failed['4']}"
    limit = min(_LIMITS[arch].program_shared_kib, SMALL_SHARED_KIB)
    if row["shared_kib"] > limit:
        failed["6"] = f"expected at most {limit} KiB of shared memory, got {row['shared_kib']}"
    if case.row_bytes is None:
        return failed
    if not 0 <= row["extra_bytes"] <= case.shared_bytes:
        failed["8"] = (
            f"expected {case.row_bytes} bytes per tile (and up to {case.shared_bytes} of weight), "
            f"got {case.row_bytes + row['extra_bytes']}"
        )
    elif case.is_forward and row["occupancy"] < 0.5:
        failed["8"] = f"expected occupancy of at least 0.5 in the forward, got {row['occupancy']}"
    return failed


_COLUMNS = ("kernel", "arch", "num_warps", "registers", "spills", "shared_kib", "occupancy")
_COLUMNS += ("loads", "stores", "barriers", "tensor_core", "bars")


def render_table(rows: Sequence[dict]) -> str:
    """The rows as aligned plain text, failures spelled out below. Loads and stores are "wide/all" of the hot part."""
    cells = [_COLUMNS, *(tuple(_cell(row, column) for column in _COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    failures = [f"{row['kernel']} on {row['arch']}: {why}" for row in rows for why in row["failures"]]
    verdict = f"{len(rows)} rows, {len(failures)} failed bars; static, not timed"
    return "\n".join([*lines, *failures, verdict])


def _cell(row: dict, column: str) -> str:
    if column == "spills":
        return f"{row['spill_store_bytes']}/{row['spill_load_bytes']}" if "spill_store_bytes" in row else "-"
    if column == "bars":
        bad = [bar for bar, verdict in row["bars"].items() if verdict == "fail"]
        return f"fail {','.join(bad)}" if bad else f"pass {','.join(row['bars'])}"
    return str(row.get(column, "-"))
