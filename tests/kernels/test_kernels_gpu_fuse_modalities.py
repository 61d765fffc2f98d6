"""fuse_modalities on a GPU: bfloat16, large shapes, 64-bit offsets, no host sync, the same bits again."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import judge_call, make_call, map_tensors
from kernel_rule import LAYOUTS, in_layout

from trichord_kernels import fuse_modalities

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _judge(call) -> None:
    grads = [torch.randn_like(call["inputs"][0]) for _ in range(2)]
    judge_call(fuse_modalities, call, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["scalar", "channel", "gated"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (4099, 1024), (2048, 4096), (513, 4104), (300, 8192)])
def test_error_rule(shape, factors, dtype) -> None:
    _judge(make_call(*shape, 3, factors, "rms", present=True, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("num_inputs", "factors"), [(1, "none"), (2, "mixed"), (8, "channel"), (8, "gated")])
def test_paths_in_bfloat16(num_inputs, factors, residual, norm) -> None:
    call = make_call(700, 2048, num_inputs, factors, norm, residual=residual, dtype=torch.bfloat16, device="cuda")
    _judge(call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_bfloat16(layout) -> None:
    call = make_call(37, 136, 2, "gated", dtype=torch.bfloat16, device="cuda")
    _judge(map_tensors(call, lambda t: in_layout(t, layout) if t.dim() == 2 else t))


def test_never_waits_for_the_device() -> None:
    call = make_call(100, 64, 3, "gated", "rms", present=True, device="cuda")
    leaves = map_tensors(call, lambda t: t.requires_grad_())
    grads = [torch.randn(100, 64, device="cuda") for _ in range(2)]
    torch.autograd.backward(fuse_modalities(**leaves), grads)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.backward(fuse_modalities(**leaves), grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits() -> None:
    rows, width = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * width:
        pytest.skip("needs 13 GiB of free GPU memory")
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device="cuda")
    weight = torch.randn(width, device="cuda").bfloat16()
    out = fuse_modalities([x], [weight])
    torch.testing.assert_close(out[-1], (weight.float() * x[-1].float()).bfloat16())
