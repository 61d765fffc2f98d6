"""The static judge: it compiles without a GPU, passes our kernels, and fails kernels that deserve it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest

from trichord_kernels.errors import KernelError
from trichord_kernels.static.baselines import ROW_PAIRS, ROW_PEERS
from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.cases import op_cases, static_cases
from trichord_kernels.static.judge import ARCHS, compile_case, judge_case, static_report
from trichord_kernels.static.limits import occupancy
from trichord_kernels.static.table import render_table

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def _case(name: str) -> StaticCase:
    return next(case for case in static_cases("sm_90") if case.name == name)


QUICK = ["add_rms_norm_fwd.4096.bf16", "add_rms_norm_bwd.4096.bf16", "rms_norm_fwd.4104.bf16", "rms_norm_bwd.64.bf16"]


@pytest.mark.parametrize("name", QUICK)
def test_hard_bars_hold_on_sm_90(name) -> None:
    row = judge_case(_case(name), "sm_90")
    assert row["failures"] == []
    assert {"1", "2", "4", "6", "8"} <= set(row["bars"])
    assert ("5" in row["bars"]) == ("4104" in name)
    assert row["registers"] > 16
    json.dumps(row)


@pytest.mark.slow
def test_hard_bars_hold_on_every_target() -> None:
    rows = static_report()
    assert {row["arch"] for row in rows} == set(ARCHS)
    assert len(rows) == sum(len(static_cases(arch)) for arch in ARCHS)
    assert [why for row in rows for why in row["failures"]] == []


def test_addresses_are_64_bit() -> None:
    """A row number times a stride passes 2^31 at T*H*D of today's runs."""
    for name in ("add_rms_norm_fwd.4096.bf16", "add_rms_norm_bwd.4096.bf16"):
        ir = compile_case(_case(name), "sm_90").asm["ttir"]
        products = [line for line in ir.splitlines() if "arith.muli" in line]
        assert len(products) >= 5
        assert all(re.search(r": i64\b", line) for line in products), products


def test_unaligned_pointers_fail_the_width_bars() -> None:
    row = judge_case(replace(_case("rms_norm_fwd.4104.bf16"), attrs={}), "sm_90")
    assert (row["bars"]["4"], row["bars"]["5"], row["bars"]["2"]) == ("fail", "fail", "pass")
    assert "128 bits" in row["failures"][0]


def test_too_few_warps_spill_and_fail() -> None:
    row = judge_case(replace(_case("add_rms_norm_bwd.8192.bf16"), num_warps=4), "sm_90")
    assert row["bars"]["2"] == "fail"
    assert row["spill_store_bytes"] > 0
    assert row["loop_spill_bytes"] > 0


def test_reading_more_than_the_minimum_fails() -> None:
    case = _case("rms_norm_fwd.4096.bf16")
    row = judge_case(replace(case, row_bytes=case.row_bytes // 2), "sm_90")
    assert row["bars"]["8"] == "fail"


def test_a_kernel_that_does_not_compile_is_a_failed_row() -> None:
    case = _case("rms_norm_fwd.64.bf16")
    row = judge_case(replace(case, constexprs=case.constexprs | {"BLOCK_D": 63}), "sm_90")
    assert row["bars"] == {"1": "fail"}
    assert "does not compile" in row["failures"][0]
    assert "fail 1" in render_table([row])


def test_table_shows_the_row_and_says_it_is_not_timed() -> None:
    text = render_table([judge_case(_case("rms_norm_fwd.64.bf16"), "sm_90")])
    assert text.splitlines()[0].split()[:3] == ["kernel", "arch", "warps"]
    assert "pass 1,2,4,6,8" in text
    assert text.endswith("1 rows, 0 failed bars; static, not timed")


def test_unknown_architecture() -> None:
    with pytest.raises(KernelError, match="sm_80, sm_90, sm_100, gfx942, got sm_9"):
        static_report(["sm_90", "sm_9"])
    with pytest.raises(KernelError, match=r"ops out of attention, rms_norm.*, got norm"):
        static_report(["sm_90"], ["norm"])


def test_processes_give_the_rows_of_one_process() -> None:
    lines = []
    rows = static_report(["sm_90"], ["merge_embeddings"], jobs=2, say=lines.append)
    assert rows == static_report(["sm_90"], ["merge_embeddings"], jobs=1)
    assert [row["kernel"] for row in rows] == [case.name for case in op_cases("merge_embeddings", "sm_90")]
    assert len(lines) == len(rows)


def test_peers_are_paired_with_cases_that_exist() -> None:
    assert set(ROW_PAIRS) <= {case.name for case in static_cases("sm_90")}
    assert set(ROW_PAIRS.values()) <= {peer.name for peer in ROW_PEERS}


def test_peers_stand_beside_the_row_that_does_their_work() -> None:
    lines = render_table([judge_case(_case("add_rms_norm_bwd.4096.bf16"), "sm_90")]).splitlines()
    assert lines[2].split()[:5] == ["beside:", "Liger", "add_rms_bwd.4096", "sm_90", "-"]
    assert "99" in lines[2]


def test_occupancy_by_hand() -> None:
    assert occupancy("sm_90", 8, 32, 0.0) == 1.0
    assert occupancy("sm_90", 8, 255, 0.0) == 0.12  # 65536 / (256 * 256 threads) = 1 program of 8 warps out of 64
    assert occupancy("sm_80", 4, 32, 100.0) == 0.06  # shared memory holds one program
    assert occupancy("gfx942", 16, 64, 0.0) == 1.0
    assert occupancy("gfx942", 32, 64, 0.0) == 0.0  # a workgroup holds 1024 threads
    assert occupancy("sm_90", 8, 32, 228.0) == 0.0
