"""What measures on a GPU works on one: the sweep, the ceilings, peak memory. Not yet run on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trichord_kernels.bench.memory import gpu_peak_mib
from trichord_kernels.bench.timing import ceilings
from trichord_kernels.tables.collect import all_tables
from trichord_kernels.tables.sweep import _gpu_time_ms, sweep_target
from trichord_kernels.tables.sweep_targets import TARGETS
from trichord_kernels.tables.tile import arch_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", sorted(TARGETS))
def test_candidates_are_timed_and_the_table_stays(op) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for target in list(TARGETS[op]())[:2]:
        table = all_tables()[f"{op}.{target.table}"]
        before = dict(table)
        few = replace(target, candidates=target.candidates[:3])
        timings = sweep_target(few, table, arch_of(device), device, _gpu_time_ms)
        assert len(timings) == 3
        assert timings[0].time_ms is not None
        assert timings[0].time_ms > 0, timings
        assert table == before


def test_ceilings_and_peaks_are_those_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    best = ceilings(device)
    assert best.tflop_per_s > 10
    assert best.gb_per_s > 100
    assert 31 < gpu_peak_mib(lambda: torch.empty(32 * 2**20, dtype=torch.uint8, device=device), device) < 34
