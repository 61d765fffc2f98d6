"""The static judge on tensor-core kernels: it passes a good one and names what spoils the others."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace

import pytest

from trichord_kernels.static.bars import add_small_twins
from trichord_kernels.static.judge import judge_case
from trichord_kernels.static.machine_code import CodeCount
from trichord_kernels.static.serial_bound import loop_bounds
from trichord_kernels.static.table import render_table

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def _case(**changes):
    from judged_attention import attention_case

    return attention_case(**changes)


@pytest.mark.parametrize(("arch", "kind", "serial"), [("sm_80", "HMMA", 0.59), ("sm_90", "HGMMA", 0.46)])
def test_attention_as_the_tutorial_has_it_holds_every_bar(arch, kind, serial) -> None:
    """Its loops are the tutorial's, so its serial bound must be near the tutorial's (baselines.py)."""
    row = judge_case(_case(num_warps=8), arch)
    assert row["failures"] == []
    assert set(row["bars"]) == {"1", "2", "3", "4", "6", "7"}
    assert set(row["tensor_core"]) == {kind}
    full, masked = row["tensor_loops"]
    assert full["tensor_core"] == masked["tensor_core"]
    assert full["compares"] + full["selects"] <= 8 < 32 <= masked["selects"]
    assert row["serial_bound"] == pytest.approx(serial, abs=0.02)
    assert row["serial_bound"] < row["tensor_bound"] <= 1
    json.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind"), [("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")])
def test_other_targets_use_their_tensor_cores_and_get_no_bound(arch, kind) -> None:
    row = judge_case(_case(), arch)
    assert row["failures"] == []
    assert list(row["tensor_core"]) == [kind]
    assert row["serial_bound"] is None
    assert row["bars"]["3"] == "pass"
    assert row["is_reported"] == (arch == "gfx942")


def test_mask_code_in_the_full_loop_fails() -> None:
    row = judge_case(_case(mask_all=True), "sm_90")
    assert [why[:6] for why in row["failures"]] == ["bar 7:"]
    assert "without mask code" in row["failures"][0]


def test_unaligned_rows_fail_the_width_bar_and_half_the_warps_spill() -> None:
    spoilt = judge_case(_case(attrs={}, num_warps=2), "sm_80")
    assert {bar for bar, verdict in spoilt["bars"].items() if verdict == "fail"} == {"2", "4"}
    assert spoilt["hot_spill_bytes"] > 0
    assert spoilt["serial_bound"] < 0.5


def test_no_tensor_cores_of_the_architecture_fails() -> None:
    """Two warps are no warp group: the compiler falls back to HMMA."""
    row = judge_case(_case(num_warps=2, block_m=64), "sm_90")
    assert "bar 3: expected HGMMA in the hot loop, got HMMA in the kernel" in row["failures"]


def test_rows_that_are_only_reported_never_fail() -> None:
    row = judge_case(_case(mask_all=True, report_only=True), "sm_90")
    assert (row["failures"], len(row["reported"]), row["bars"]["7"]) == ([], 1, "fail")
    assert "(reported only): bar 7" in render_table([row])
    assert "0 failed bars" in render_table([row])


def _figures(name: str, shared_kib: float, **changes) -> dict:
    row = {"kernel": name, "arch": "sm_90", "shared_kib": shared_kib, "bars": {"1": "pass", "6": "pass"}}
    return row | {"tensor_core": {"HGMMA": 4}, "failures": [], "reported": [], "is_reported": False} | changes


def test_a_large_tile_needs_a_small_twin() -> None:
    large, small = _figures("a.128", 128.0), _figures("a.128.small", 96.0)
    add_small_twins([large, small])
    assert large["failures"] == []
    alone, other = _figures("a.128", 128.0), _figures("b.128.small", 96.0)
    add_small_twins([alone, other])
    assert alone["failures"] == ["bar 6: 128.0 KiB, and no case a.128.small within 99 KiB"]
    assert alone["bars"]["6"] == "fail"
    reported = _figures("a.256", 128.0, is_reported=True)
    add_small_twins([reported, _figures("a.256.small", 120.0)])
    assert (reported["failures"], len(reported["reported"])) == ([], 1)


def test_a_small_twin_is_held_to_99_kib() -> None:
    row = judge_case(replace(_case(name="judged_attention.64.small"), num_stages=7), "sm_90")
    assert row["bars"]["6"] == "fail"
    assert "at most 99 KiB" in row["failures"][0]


def test_bounds_by_hand() -> None:
    """128 queries x 64 keys of head dim 64 on 4 warps: 512 cycles of tensor cores, 544 of 2^x, 142.75 x 4 of issue."""
    loop = CodeCount(instructions=571, tensor_core=Counter(HGMMA=16), tensor_flops=16 * 32768, mufu=68)
    bounds = loop_bounds("sm_90", 4, loop, 4 * 128 * 64 * 64)
    assert (bounds.tensor_bound, bounds.serial_bound) == (round(512 / 571, 3), round(512 / (512 + 571), 3))
    special = loop_bounds("sm_90", 4, replace(loop, instructions=100), None)
    assert (special.tensor_bound, special.serial_bound) == (round(512 / 544, 3), round(512 / (512 + 544), 3))
    padded = loop_bounds("sm_90", 4, loop, 3 * 128 * 64 * 64)  # 48 columns held as 64
    assert padded.tensor_bound == round(384 / 571, 3)
    unrolled = loop_bounds("sm_90", 4, loop, 128 * 64 * 64)  # four passes of the loop as written
    assert unrolled == bounds
    assert loop_bounds("sm_100", 4, loop, None) is None
    assert loop_bounds("sm_90", 4, CodeCount(instructions=9), None) is None


def test_attention_peers_of_the_same_direction_head_dim_and_architecture() -> None:
    row = judge_case(_case(), "sm_90")
    beside = [line.split()[1] for line in render_table([row]).splitlines() if "beside:" in line]
    assert beside == ["fla.fwd.d64", "tut.fwd.d64.causal.128x64w4", "tut.fwd.d64.causal.128x64w8"]
