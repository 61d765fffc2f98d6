"""The static judge: compile every kernel ahead of time, without a GPU, and hold its machine code to hard bars.

It shows that a kernel compiles for each architecture, does not spill, uses the tensor cores it should, moves its data
in 128-bit accesses and fits. It cannot show time, bandwidth or races: every row says "static, not timed".
docs/kernels/static.md has the bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from trichord_kernels.errors import KernelError
from trichord_kernels.static.bars import add_small_twins, failed_bars, judged_bars
from trichord_kernels.static.baselines import peer_rows
from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.cases import op_cases, op_names
from trichord_kernels.static.limits import LIMITS, occupancy
from trichord_kernels.static.machine_code import KernelCode, read_amdgcn, read_cubin
from trichord_kernels.static.serial_bound import loop_bounds

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def static_report(
    archs: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Compile each case of `ops` (default: all) for each architecture (default: all four) and judge it.

    Needs no GPU: 0.3 s for a row kernel, up to 20 s for a matmul, in `jobs` processes (a script that asks for more than
    one needs the usual `if __name__ == "__main__":`); Triton caches what it compiled. `say` gets a line per row.
    Returns the JSON-able rows of `judge_case` in the order of the cases, each with `peers`: the figures of other
    kernels that do its work (baselines.py). Raises KernelError for an unknown architecture or op, or under the
    interpreter.
    """
    _check_names("archs", ARCHS, archs)
    _check_names("ops", op_names(), ops)
    tasks = [
        (arch, op, index)
        for arch in archs or ARCHS
        for op in ops or op_names()
        for index in range(len(op_cases(op, arch)))
    ]
    jobs = min(jobs, len(tasks))
    rows: dict[tuple[str, str, int], dict] = {}
    for task, row in _judged(tasks, jobs):
        rows[task] = row
        say(f"{len(rows)}/{len(tasks)} {row['kernel']} on {row['arch']}: {'; '.join(row['failures']) or 'done'}")
    ordered = [rows[task] for task in tasks]
    add_small_twins(ordered)
    return [row | {"peers": peer_rows(row)} for row in ordered]


def judge_case(case: StaticCase, arch: str, op: str = "") -> dict[str, Any]:
    """One row of the report. A case that does not compile is a row that fails bar 1, not an exception.

    Keys: kernel, op, arch, num_warps, num_stages, is_forward, head_dim, is_reported, note; registers;
    spill_store_bytes and spill_load_bytes of the whole kernel, hot_spill_bytes and loop_spill_bytes of the hot part and
    of all loops, cold_spill_bytes of what lies in no loop; shared_kib, tensor_memory_columns (sm_100); occupancy (share
    of the warp slots); loads and stores ("wide/all" of the hot part), whole_loads, whole_stores; barriers; tensor_core
    ({opcode: count}), tensor_loops (what each innermost loop that uses tensor cores holds, the hot one first);
    tensor_bound and serial_bound (sm_80, sm_90: see serial_bound.py); extra_bytes (moved per tile beyond the minimum);
    bars ({number: "pass" | "fail"}), failures (sentences) and, for rows that are never failed, reported (sentences).
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    is_reported = case.report_only or (case.matmul and arch.startswith("gfx"))
    row: dict[str, Any] = {"kernel": case.name, "op": op or case.name, "arch": arch, "note": "static, not timed"}
    row |= {"num_warps": case.num_warps, "num_stages": case.num_stages, "is_forward": case.is_forward}
    row |= {"head_dim": case.head_dim, "is_reported": is_reported}
    try:
        compiled = compile_case(case, arch)
    except (CompilationError, PTXASError, RuntimeError) as error:
        failed, judged = {"1": f"does not compile: {error}"}, ["1"]
    else:
        code = read_amdgcn(compiled.asm["amdgcn"]) if arch.startswith("gfx") else read_cubin(compiled.asm["cubin"])
        row |= _figures(case, arch, code, compiled.metadata)
        failed, judged = failed_bars(case, arch, code, row), judged_bars(case, arch)
    sentences = [f"bar {bar}: {why}" for bar, why in failed.items()]
    row["bars"] = {bar: "fail" if bar in failed else "pass" for bar in judged}
    row["failures"], row["reported"] = ([], sentences) if is_reported else (sentences, [])
    return row


def compile_case(case: StaticCase, arch: str) -> Any:
    """triton.compile for `arch` (a compiled kernel with `.asm` and `.metadata`); raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise KernelError("static report: the kernels were imported under the interpreter; unset TRITON_INTERPRET")
    limits = LIMITS[arch]
    target = GPUTarget("hip", arch, limits.warp_size)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), limits.warp_size)
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    return triton.compile(source, target=target, options=options)


def _figures(case: StaticCase, arch: str, code: KernelCode, metadata: Any) -> dict[str, Any]:
    shared_kib = round(metadata.shared / 1024, 2)
    bounds = None
    if code.tensor_loops:
        bounds = loop_bounds(arch, case.num_warps, code.hot, case.flops_per_iteration)
    threads = case.num_warps * LIMITS[arch].warp_size
    moved = threads * (code.hot.loads.thread_bytes + code.hot.stores.thread_bytes)
    return {
        "registers": code.registers,
        "spill_store_bytes": code.whole.spill_store_bytes,
        "spill_load_bytes": code.whole.spill_load_bytes,
        "hot_spill_bytes": code.hot.spill_bytes,
        "loop_spill_bytes": code.loops.spill_bytes,
        "cold_spill_bytes": code.whole.spill_bytes - code.loops.spill_bytes,
        "shared_kib": shared_kib,
        "tensor_memory_columns": getattr(metadata, "tmem_size", 0) or 0,
        "occupancy": occupancy(arch, case.num_warps, code.registers, shared_kib),
        "loads": str(code.hot.loads),
        "stores": str(code.hot.stores),
        "whole_loads": str(code.whole.loads),
        "whole_stores": str(code.whole.stores),
        "barriers": code.whole.barriers,
        "tensor_core": dict(code.whole.tensor_core),
        "tensor_loops": [
            {
                "instructions": loop.instructions,
                "tensor_core": loop.tensor_core.total(),
                "compares": loop.compares,
                "selects": loop.selects,
                "exponentials": loop.exponentials,
                "spill_bytes": loop.spill_bytes,
            }
            for loop in code.tensor_loops
        ],
        "tensor_bound": bounds and bounds.tensor_bound,
        "serial_bound": bounds and bounds.serial_bound,
        "extra_bytes": None if case.row_bytes is None else moved - case.row_bytes,
    }


def _check_names(what: str, known: Sequence[str], asked: Sequence[str] | None) -> None:
    if unknown := sorted(set(asked or ()) - set(known)):
        raise KernelError(f"static report: expected {what} out of {', '.join(known)}, got {', '.join(unknown)}")


_Task = tuple[str, str, int]


def _judged(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[_Task, dict]]:
    """(task, row) as they are done: here for one job, else in processes, which look their case up (kernels do not
    travel between processes)."""
    if jobs <= 1:
        yield from ((task, _judge_task(task)) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_judge_task, task): task for task in tasks}
        for done in as_completed(pending):
            yield pending[done], done.result()


def _judge_task(task: _Task) -> dict:
    arch, op, index = task
    return judge_case(op_cases(op, arch)[index], arch, op)
