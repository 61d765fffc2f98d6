"""fuse_modalities on a CPU as a compiler sees it, its op as a planner sees it, and its compiled code."""

from __future__ import annotations

import os
import re

import pytest
import torch
from fusion_cases import make_call, map_tensors, run_with_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from trichord_kernels import fuse_modalities
from trichord_kernels.static.cases.fuse_modalities import cases
from trichord_kernels.static.judge import compile_case, judge_case


@pytest.mark.parametrize("factors", ["mixed", "gated"])
def test_compiles_without_a_graph_break_at_two_lengths(factors) -> None:
    compiled = torch.compile(fuse_modalities, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        call = make_call(length, 24, 2, factors, "rms", present=True)
        grads = [torch.randn(length, 24) for _ in range(2)]
        want, got = (run_with_grads(function, call, grads) for function in (fuse_modalities, compiled))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("residual", [False, True])
def test_shapes_on_a_gpu_without_one(norm, residual, monkeypatch) -> None:
    monkeypatch.delenv("TRICHORD_KERNELS", raising=False)
    with FakeTensorMode():
        call = make_call(6, 8, 2, "mixed", norm, residual=residual, dtype=torch.bfloat16)
        result = fuse_modalities(**map_tensors(call, lambda t: torch.empty_like(t, device="cuda")))
    for out in result if residual else (result,):
        assert (out.shape, out.dtype, out.device.type) == ((6, 8), torch.bfloat16, "cuda")
        assert out.is_contiguous()


compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
QUICK = ["fwd.scalar2.ar.rms.4096", "bwd.channel2.ar.rms.4104", "fwd.gated2.r.rms.4096", "bwd.gated2.r.rms.1024"]


@compiles
@pytest.mark.parametrize("name", QUICK)
def test_hard_bars_hold_on_sm_90(name) -> None:
    case = next(case for case in cases("sm_90") if case.name == f"fuse_modalities_{name}.bf16")
    row = judge_case(case, "sm_90")
    assert row["failures"] == []
    assert {"1", "2", "4", "6", "8"} <= set(row["bars"])
    assert ("5" in row["bars"]) == ("4104" in name)


@compiles
def test_addresses_are_64_bit() -> None:
    for direction in ("fwd", "bwd"):
        name = f"fuse_modalities_{direction}.channel2.ar.rms.4096.bf16"
        ir = compile_case(next(case for case in cases("sm_90") if case.name == name), "sm_90").asm["ttir"]
        products = [line for line in ir.splitlines() if "arith.muli" in line]
        wide = [line for line in products if re.search(r": (tensor<[\dx]+)?i64\b", line)]
        assert len(wide) >= 5
        narrow = [line for line in products if line not in wide]
        assert all("tl.program_id" not in line and "stride" not in line for line in narrow), narrow
