"""merge_embeddings on a GPU: bfloat16, large streams, 64-bit offsets, no host sync, the same bits again."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import LAYOUTS, in_layout

from trichord_kernels import merge_embeddings, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _run(function, embeds, features, positions, grad) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (embeds, features)]
    out = function(*leaves, positions)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _same_bits_as_on_a_cpu(embeds, features, positions, grad) -> None:
    want = _run(reference.merge_embeddings, *(t.cpu() for t in (embeds, features, positions, grad)))
    for _ in range(3):
        got = _run(merge_embeddings, embeds, features, positions, grad)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))


def _positions(num_rows: int, num_features: int) -> torch.Tensor:
    positions = torch.randperm(num_rows, device="cuda")[:num_features].int()
    positions[::7] = -1
    return positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1, 1), (16384, 9000, 4096), (4099, 1031, 4104), (513, 513, 123), (64, 0, 72)])
def test_moves_rows_exactly(size, dtype) -> None:
    num_rows, num_features, width = size
    embeds, features, grad = (
        torch.randn(n, width, device="cuda").to(dtype) for n in (num_rows, num_features, num_rows)
    )
    _same_bits_as_on_a_cpu(embeds, features, _positions(num_rows, num_features), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout) -> None:
    embeds, features, grad = (in_layout(torch.randn(n, 136, device="cuda").bfloat16(), layout) for n in (37, 20, 37))
    _same_bits_as_on_a_cpu(embeds, features, _positions(37, 20), grad)


def test_never_waits_for_the_device() -> None:
    embeds, features = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (100, 30))
    positions, grad = _positions(100, 30), torch.randn(100, 64, device="cuda")
    merge_embeddings(embeds, features, positions).backward(grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_embeddings(embeds, features, positions).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits() -> None:
    rows, width = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 5 * rows * width:
        pytest.skip("needs 10 GiB of free GPU memory")
    embeds = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    embeds[-1] = 1
    features = torch.full((1, width), 2.0, device="cuda", dtype=torch.bfloat16)
    out = merge_embeddings(embeds, features, torch.tensor([rows - 2], device="cuda"))
    assert out[-3:, 0].tolist() == [0, 2, 1]
