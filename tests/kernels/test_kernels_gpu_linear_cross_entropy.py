"""What only a GPU can show of linear_cross_entropy: bfloat16, big vocabularies, 64-bit offsets, no host sync, bits."""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_rule import OPTIONS, judge_loss, operands, run_with_grads

from trichord_kernels import linear_cross_entropy
from trichord_kernels.bench.memory import gpu_peak_mib
from trichord_kernels.ops import linear_cross_entropy as op
from trichord_kernels.reference.linear_cross_entropy import row_losses
from trichord_kernels.reference.linear_cross_entropy_chunks import LossOptions
from trichord_kernels.tables import linear_cross_entropy as tables

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 9), (67, 64, 4097), (700, 256, 32000)], ids=str)
def test_error_rule(shape, dtype, options, monkeypatch) -> None:
    monkeypatch.setattr(tables, "GPU_CHUNK", tables.Chunk(2**29, 256, "test"))
    judge_loss(*operands(*shape, dtype, "cuda"), options | {"reduction": "none"})


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_large_vocabularies_in_bfloat16(vocab_size, reduction) -> None:
    tensors, labels = operands(300, 128, vocab_size, torch.bfloat16, "cuda")
    labels[0] = vocab_size - 1
    judge_loss(tensors, labels, {"reduction": reduction, "num_labelled": int((labels != -100).sum())})


def test_many_runs_give_the_same_bits() -> None:
    tensors, labels = operands(3000, 256, 50265, torch.bfloat16, "cuda")
    grad, options = torch.randn(3000, device="cuda"), {"reduction": "none", "z_loss": 1e-4}
    first = run_with_grads(linear_cross_entropy, tensors, labels, grad, options)
    for _ in range(10):
        again = run_with_grads(linear_cross_entropy, tensors, labels, grad, options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_never_waits_for_the_device() -> None:
    tensors, labels = operands(300, 64, 1000, torch.bfloat16, "cuda")
    count = int((labels != -100).sum())
    options = {"token_weights": torch.rand(300, device="cuda"), "reduction": "mean", "num_labelled": count}
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    linear_cross_entropy(labels=labels, **leaves, **options).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(labels=labels, **leaves, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_left_out_are_not_multiplied() -> None:
    """40 % of the rows take about 40 % of the time; two thirds is the bound of this test."""
    from triton.testing import do_bench

    tensors, labels = operands(8192, 1024, 32000, torch.bfloat16, "cuda")
    labels = torch.where(torch.arange(8192, device="cuda") % 5 < 2, labels.clamp(min=0), -100)
    count = int((labels != -100).sum())
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()

    def run(num_labelled: int | None) -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, num_labelled=num_labelled), (hidden, weight))

    assert do_bench(lambda: run(count)) < 0.67 * do_bench(lambda: run(None))


def test_peak_memory_is_a_chunk_and_the_gradients() -> None:
    tensors, labels = operands(8192, 512, 128256, torch.bfloat16, "cuda")
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()

    def run() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))

    run()
    gradients = weight.numel() * (4 + 2) + hidden.nbytes
    assert gpu_peak_mib(run, torch.device("cuda")) * 2**20 < tables.GPU_CHUNK.num_bytes * 1.1 + gradients * 1.1


def test_offsets_beyond_32_bits() -> None:
    """Logits of one chunk whose last row starts behind element 2^31."""
    vocab_size = 128256
    rows = 2**31 // vocab_size + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab_size:
        pytest.skip("needs 7 GiB of free GPU memory")
    logits = torch.zeros(rows, vocab_size, device="cuda", dtype=torch.bfloat16)
    logits[-1] = torch.randn(vocab_size, device="cuda")
    labels = torch.full((rows,), -100, device="cuda")
    labels[-1] = 7
    options, grad = LossOptions(-100, 0.1, 0.0, None), torch.ones(rows, device="cuda")
    want = row_losses(logits[-1:].clone(), labels[-1:], options)
    loss, top, log_sum = op._row_losses(logits, labels, options)
    torch.testing.assert_close((loss[-1:], top[-1:], log_sum[-1:]), want, rtol=1e-5, atol=1e-5)
    last = logits[-1].float()
    op._logits_to_gradient(logits, labels, grad, top, log_sum, options)
    expected = last.softmax(0) - 0.1 / vocab_size
    expected[7] -= 0.9
    torch.testing.assert_close(logits[-1].float(), expected, rtol=1e-2, atol=1e-6)
    assert not logits[:-1].any()


def test_labels_outside_the_vocabulary_give_nan() -> None:
    tensors, _ = operands(4, 64, 1000, torch.bfloat16, "cuda")
    labels = torch.tensor([5, -1, 1000, 2**40], device="cuda")
    losses = linear_cross_entropy(labels=labels, **tensors, reduction="none")
    assert losses.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_at_two_lengths(backend) -> None:
    def block(hidden, weight, labels):
        return linear_cross_entropy(hidden * 2, weight, labels, reduction="mean")

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for length in (65, 300):
        tensors, labels = operands(length, 64, 1000, torch.bfloat16, "cuda")
        leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
        want, got = (torch.autograd.grad(function(*leaves, labels), leaves) for function in (block, compiled))
        for a, b in zip(want, got):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)
