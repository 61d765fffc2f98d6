"""The sweep with made-up timings: what it launches, what it drops, what it writes; and `make gpu` without a GPU."""

from __future__ import annotations

import pytest
import torch

from trichord_kernels.tables.collect import all_tables
from trichord_kernels.tables.sweep import EXIT_NO_GPU, main, sweep_target, swept_text
from trichord_kernels.tables.sweep_targets import TARGETS, SweepTarget
from trichord_kernels.tables.tile import Tile

KEY = ("sm_90", 64)
IN_USE = Tile(128, 64, 4, 3, "static")
CANDIDATES = tuple(Tile(block_m, 64, 4, 3, "candidate") for block_m in (16, 32, 64, 128))
TEXT = f'TABLE = {{\n    ("sm_90", 64): Tile(128, 64, 4, 3, "static"),\n    # kept\n    ("sm_80", 64): {IN_USE},\n}}\n'


def _sweep(table: dict) -> list:
    """A kernel that is the faster the fewer rows it takes, does not fit 16 of them, and is wrong with 32."""

    def make(device: torch.device):
        def run():
            rows = table[KEY].block_m
            if rows == 16:
                raise RuntimeError("out of resource: shared memory\nand more")
            return (torch.ones(4, device=device) * (2 if rows == 32 else 1),)

        return run

    target = SweepTarget("fake", "TABLE", (64,), CANDIDATES, make)
    return sweep_target(target, table, "sm_90", torch.device("cpu"), lambda run: table[KEY].block_m / 10)


def test_candidates_run_in_place_of_the_entry_and_wrong_ones_are_out() -> None:
    table = {KEY: IN_USE, ("sm_80", 64): IN_USE}
    timings = _sweep(table)
    assert [(timing.tile.block_m, timing.time_ms) for timing in timings[:2]] == [(64, 6.4), (128, 12.8)]
    reasons = {timing.tile.block_m: timing.why_not for timing in timings[2:]}
    assert reasons == {
        16: "out of resource: shared memory",
        32: "its results differ from those of the entry in use",
    }
    assert table == {KEY: IN_USE, ("sm_80", 64): IN_USE}


def test_the_fastest_is_written_with_its_source() -> None:
    text = swept_text(TEXT, "TABLE", "sm_90", (64,), _sweep({KEY: IN_USE}), "swept on NVIDIA H100, 2026-11-22")
    swept = 'Tile(64, 64, 4, 3, "swept on NVIDIA H100, 2026-11-22")'
    assert text == TEXT.replace('Tile(128, 64, 4, 3, "static")', swept, 1)
    assert swept_text(TEXT, "TABLE", "sm_90", (64,), [], "swept") == TEXT


def test_targets_are_of_tables_that_exist_and_have_candidates() -> None:
    tables = all_tables()
    for op, targets in TARGETS.items():
        for target in targets():
            keys = {key[1:] for key in tables[f"{op}.{target.table}"]}
            assert target.key in keys, (op, target.table, target.key)
            assert len(set(target.candidates)) == len(target.candidates) >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert main(["--op", "attention"]) == EXIT_NO_GPU
    assert "no GPU here" in capsys.readouterr().err
