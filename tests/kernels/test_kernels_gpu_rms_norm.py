"""What only a GPU can show: bfloat16, large shapes, 64-bit offsets, no host sync, determinism of parallel programs."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import LAYOUTS, in_layout, judge, run_with_grads, sum_floor

from trichord_kernels import log_mel, reference, rms_norm
from trichord_kernels.bench import bench_kernels

pytestmark = pytest.mark.gpu
EPS = 1e-5


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _judge(inputs, grads) -> None:
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    wide_grads = tuple(None if t is None else t.double() for t in grads)
    ours = run_with_grads(rms_norm, inputs, EPS, grads)
    exact = run_with_grads(reference.rms_norm, wide, EPS, wide_grads)
    h = wide["x"] if wide["residual"] is None else exact["new_residual"]
    normed = reference.rms_norm(h, torch.ones_like(h[0]), EPS)
    floors = {"grad_weight": sum_floor(wide_grads[0] * normed)}
    judge(ours, run_with_grads(reference.rms_norm, inputs, EPS, grads), exact, floors)
    for _ in range(3):
        again = run_with_grads(rms_norm, inputs, EPS, grads)
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 123), (4099, 64), (16384, 1024), (8191, 4096), (1031, 4104), (513, 8192)]
)
def test_error_rule(shape, dtype, has_residual) -> None:
    x, residual, grad, grad_new_residual = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device="cuda").to(dtype)
    inputs = {"x": x, "weight": weight, "residual": residual if has_residual else None}
    _judge(inputs, (grad, grad_new_residual if has_residual else None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_bfloat16(layout) -> None:
    x, residual, grad, other = (in_layout(torch.randn(37, 136, device="cuda").bfloat16(), layout) for _ in range(4))
    _judge({"x": x, "weight": torch.randn(136, device="cuda"), "residual": residual}, (grad, other))


def test_offsets_beyond_32_bits() -> None:
    rows, width = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * width:
        pytest.skip("needs 13 GiB of free GPU memory")
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device="cuda")
    weight = torch.randn(width, device="cuda").bfloat16()
    torch.testing.assert_close(rms_norm(x, weight)[-1], reference.rms_norm(x[-1], weight), rtol=0.02, atol=0.02)


def test_log_mel_never_waits_for_the_device() -> None:
    waveforms, lengths = torch.rand(3, 16_000), [16_000, 150, 4_001]
    on_gpu = waveforms.cuda()
    log_mel(on_gpu, lengths)  # plans and constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = log_mel(on_gpu, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), log_mel(waveforms, lengths), atol=1e-3, rtol=0)


def test_bench_rows() -> None:
    assert all(row["time_ms"] > 0 for row in bench_kernels("cuda"))
