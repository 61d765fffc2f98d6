"""The bench rows: present for every op, labelled, sane; their log; peak memory of a run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from trichord_kernels.bench import bench_kernels, op_names
from trichord_kernels.bench.log import append_section, markdown_table
from trichord_kernels.bench.memory import peak_mib
from trichord_kernels.errors import KernelError


@pytest.mark.parametrize("op", op_names())
def test_cpu_rows(op) -> None:
    rows = bench_kernels("cpu", repeats=2, ops=[op])
    assert rows
    for row in rows:
        assert row["kernel"].removeprefix("add_").startswith(op)
        assert min(row["time_ms"], row["torch_ms"], row["gb_per_s"]) > 0
        assert row["note"].startswith("reference path on a CPU")
    json.dumps(rows)


def test_unknown_op() -> None:
    with pytest.raises(KernelError, match=r"ops out of rms_norm.*, got norm"):
        bench_kernels(ops=["norm"])


def test_figures_are_a_section_at_the_end_of_the_log(tmp_path) -> None:
    log = tmp_path / "log.md"
    rows = [
        {"kernel": "a", "shape": [2, 3], "time_ms": 0.123456, "against": "torch SDPA"},
        {"kernel": "a", "against": "flash-attn", "note": "absent: none", "odd": 1},
    ]
    append_section(log, "Kernels on A GPU", "`make gpu`", rows)
    append_section(log, "Again", "", rows)
    text = log.read_text()
    assert text.startswith("## 20")
    assert "Kernels on A GPU\n\n`make gpu`\n\n| kernel | shape | against | ms | note | odd |\n| --- |" in text
    assert text.count("| a | 2 x 3 | torch SDPA | 0.1235 |  |  |\n| a |  | flash-attn |  | absent: none | 1 |\n") == 2
    assert text.endswith("| 1 |\n")
    assert markdown_table([]).count("\n") == 2


def _allocating_run(num_mib: int) -> Callable[[], object]:
    held = torch.ones(64 * 2**18)  # 64 MiB of input: not counted
    return lambda: held[: num_mib * 2**18] + 1


def _failing_run() -> Callable[[], object]:
    raise ValueError("no inputs")


def test_peak_memory_is_of_the_run_alone() -> None:
    assert 30 < peak_mib(_allocating_run, 32) < 40


def test_a_run_that_fails_in_its_process_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"_failing_run: expected a figure .* exit code 1"):
        peak_mib(_failing_run)
