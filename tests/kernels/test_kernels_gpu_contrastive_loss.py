"""What only a GPU can show of the contrastive loss: bfloat16, large batches, 64-bit offsets, no sync, bits, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contrastive_loss_rule import MODES, judge_loss, messy_slots, operands, run
from kernel_rule import LAYOUTS, in_layout

from trichord_kernels import contrastive_loss, reference
from trichord_kernels.bench.contrastive_loss import Shape, inputs, run_dense, run_ours
from trichord_kernels.bench.memory import gpu_peak_mib

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@pytest.mark.parametrize("is_messy", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (67, 130, 40), (300, 1000, 128), (700, 500, 256), (513, 700, 1160)], ids=str
)
def test_error_rule(shape, dtype, mode, is_messy) -> None:
    num_queries, num_targets, size = shape
    tensors = operands(num_queries, num_queries if mode == "symmetric" else num_targets, size, dtype, scale=10.0)
    slots = _on_gpu(messy_slots(tensors, groups=100)) if is_messy else {}
    tensors = _on_gpu(tensors)
    judge_loss(run(contrastive_loss, tensors, **MODES[mode], **slots), tensors, **MODES[mode], **slots)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_bfloat16(layout) -> None:
    tensors = _on_gpu(operands(137, 137, 136, torch.bfloat16))
    for name in ("queries", "targets"):
        tensors[name] = in_layout(tensors[name], layout)
    judge_loss(run(contrastive_loss, tensors, **MODES["symmetric"]), tensors, **MODES["symmetric"])


@pytest.mark.parametrize("mode", MODES)
def test_many_runs_give_the_same_bits(mode) -> None:
    tensors = operands(3000, 3000, 256, torch.bfloat16, scale=30.0)
    slots = _on_gpu(messy_slots(tensors, groups=500))
    tensors = _on_gpu(tensors)
    first = run(contrastive_loss, tensors, **MODES[mode], **slots)
    for _ in range(10):
        again = run(contrastive_loss, tensors, **MODES[mode], **slots)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
def test_never_waits_for_the_device(mode) -> None:
    tensors = operands(300, 300, 64, torch.bfloat16)
    slots = _on_gpu(messy_slots(tensors))
    leaves = [tensor.requires_grad_() for tensor in _on_gpu(tensors).values()]
    contrastive_loss(*leaves, **MODES[mode], **slots).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrastive_loss(*leaves, **MODES[mode], **slots).backward()
        contrastive_loss(*leaves, **MODES[mode], **slots, return_gradients=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits() -> None:
    """Candidates whose features lie more than 2^31 elements into their tensor."""
    size = 2048
    num_targets = 2**31 // size + 70
    if torch.cuda.mem_get_info()[0] < 5 * num_targets * size:
        pytest.skip("needs 11 GiB of free GPU memory")
    targets = torch.zeros(num_targets, size, device="cuda", dtype=torch.bfloat16)
    targets[-70:] = F.normalize(torch.randn(70, size, device="cuda"), dim=1)
    valid = torch.arange(num_targets, device="cuda") >= num_targets - 70
    queries = targets[-70:].clone()
    groups = torch.arange(num_targets, device="cuda")
    scale = torch.tensor(5.0, device="cuda")
    slots = {"query_groups": groups[-70:], "target_groups": groups, "target_valid": valid, "symmetric": False}
    loss, grads = contrastive_loss(queries, targets, scale, **slots, return_gradients=True)
    want, want_grads = reference.contrastive_loss(queries, queries, scale, symmetric=False, return_gradients=True)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(grads.targets[-70:], want_grads.targets, rtol=2e-2, atol=2e-3)


def test_peak_memory_is_far_below_the_logits() -> None:
    tensors = inputs(Shape(16384, 256), "cuda")
    ours, dense = (gpu_peak_mib(lambda run=run: run(*tensors), tensors[0].device) for run in (run_ours, run_dense))
    assert ours < dense / 8, f"{ours} MiB, dense {dense} MiB"
