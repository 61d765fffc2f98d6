"""Time the candidate tiles of an op on the GPU at hand and write the fastest into its table.

    python -m trichord_kernels.tables.sweep --op attention [--dry-run] [--log docs/log.md]

Exit code 3 where there is no GPU. The table's file is rewritten in place, each entry with its source; commit it after
`trichord bench kernels --static` and `pytest -m gpu tests/kernels` hold. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import trichord_kernels.tables as tables_package
from trichord_kernels.bench.log import append_section
from trichord_kernels.tables.collect import Table, all_tables
from trichord_kernels.tables.rewrite import rewrite_table
from trichord_kernels.tables.sweep_targets import TARGETS, Run, SweepTarget
from trichord_kernels.tables.tile import Tile, arch_of

EXIT_NO_GPU = 3
TOLERANCE = 0.02  # of the largest value: tiles round differently in half precision, a wrong result is off by more
_MISSING = object()


@dataclass(frozen=True)
class Timing:
    """A candidate's median time, or why it has none."""

    tile: Tile
    time_ms: float | None
    why_not: str = ""


def sweep_target(
    target: SweepTarget, table: Table, arch: str, device: torch.device, time_ms: Callable[[Run], float]
) -> list[Timing]:
    """Every candidate launched in place of the table's entry, fastest first, those without a time last.

    The table is as before afterwards. A candidate is out if it does not compile or fit, or if its results differ from
    those of the entry in use by more than TOLERANCE.
    """
    run = target.make(device)
    expected = run()
    timings = []
    for tile in target.candidates:
        with _entry(table, (arch, *target.key), tile):
            timings.append(_time(tile, run, expected, time_ms))
    return sorted(timings, key=lambda timing: (timing.time_ms is None, timing.time_ms or 0.0))


def swept_text(text: str, table: str, arch: str, key: tuple, timings: Sequence[Timing], source: str) -> str:
    """The table's source with the fastest candidate as the entry (arch, *key); unchanged if no candidate ran."""
    if not timings or timings[0].time_ms is None:
        return text
    return rewrite_table(text, table, {(arch, *key): replace(timings[0].tile, source=source)})


@contextmanager
def _entry(table: Table, key: tuple, tile: Tile) -> Iterator[None]:
    before = table.get(key, _MISSING)
    table[key] = tile
    try:
        yield
    finally:
        if isinstance(before, Tile):
            table[key] = before
        else:
            del table[key]


def _time(tile: Tile, run: Run, expected: Sequence[Tensor], time_ms: Callable[[Run], float]) -> Timing:
    from triton.errors import TritonError

    try:
        found = run()
        if not all(_is_close(mine, theirs) for mine, theirs in zip(found, expected)):
            return Timing(tile, None, "its results differ from those of the entry in use")
        return Timing(tile, time_ms(run))
    except (TritonError, RuntimeError) as error:
        return Timing(tile, None, str(error).splitlines()[0])


def _is_close(mine: Tensor, theirs: Tensor) -> bool:
    return bool((mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


def _gpu_time_ms(run: Run) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]  untyped: a float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trichord_kernels.tables.sweep", description=__doc__)
    parser.add_argument("--op", action="append", choices=sorted(TARGETS), help="repeatable; default: all")
    parser.add_argument("--dry-run", action="store_true", help="time and print, leave the tables as they are")
    parser.add_argument("--log", type=Path, help="add what was chosen to this Markdown file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("sweep: torch sees no GPU here; run it where nvidia-smi or rocm-smi lists one", file=sys.stderr)
        return EXIT_NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [row for op in options.op or sorted(TARGETS) for row in _sweep_op(op, device, options.dry_run)]
    if options.log:
        title = f"Tiles swept on {torch.cuda.get_device_name(device)}"
        text = f"`python -m trichord_kernels.tables.sweep`, torch {torch.__version__}. Medians."
        append_section(options.log, title, text, rows)
    return 0


def _sweep_op(op: str, device: torch.device, dry_run: bool) -> list[dict]:
    """Sweep every entry of an op, write its table unless `dry_run`; a row per entry for the log."""
    arch, source = arch_of(device), f"swept on {torch.cuda.get_device_name(device)}, {date.today().isoformat()}"
    file = Path(tables_package.__path__[0]) / f"{op}.py"
    rows = []
    for target in TARGETS[op]():
        name, key = f"{op}.{target.table}", (arch, *target.key)
        timings = sweep_target(target, all_tables()[name], arch, device, _gpu_time_ms)
        print("\n  ".join([f"{name} {key}", *map(_describe, timings)]))
        if not dry_run:
            file.write_text(swept_text(file.read_text(), target.table, arch, target.key, timings, source))
        ran = sum(timing.time_ms is not None for timing in timings)
        rows.append(
            {"table": name, "entry": str(key), "fastest": _describe(timings[0]), "ran": ran, "of": len(timings)}
        )
    return rows


def _describe(timing: Timing) -> str:
    tile = timing.tile
    shape = f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
    return f"{shape}: {timing.why_not or f'{timing.time_ms:.4f} ms'}"


if __name__ == "__main__":
    sys.exit(main())
