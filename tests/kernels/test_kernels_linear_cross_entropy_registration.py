"""linear_cross_entropy as torch ops where the twin does the work: checks of the registration, graphs, fake tensors."""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_rule import operands
from torch._subclasses.fake_tensor import FakeTensorMode

from trichord_kernels import linear_cross_entropy, reference

op = pytest.importorskip("trichord_kernels.ops.linear_cross_entropy")
OPTIONS = (-100, 0.1, 1e-3, 5.0, None, None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, has_bias) -> None:
    tensors, labels = operands(6, 8, 33, dtype)
    hidden, weight, bias = (tensors[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    bias = bias if has_bias else None
    permuted = hidden.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(op.linear_cross_entropy_forward, (permuted, weight, labels, bias, *OPTIONS))
    losses, statistics = op.linear_cross_entropy_forward(hidden, weight, labels, bias, *OPTIONS)
    detached = [None if t is None else t.detach() for t in (torch.randn_like(losses), hidden, weight, labels, bias)]
    for needed in ((True, True, has_bias), (True, False, False), (False, True, False)):
        arguments = (*detached, statistics.detach(), *OPTIONS, *needed)
        torch.library.opcheck(op.linear_cross_entropy_backward, arguments)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}], ids=["plain", "all"]
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_compiles_without_a_graph_break_at_two_lengths(reduction, options) -> None:
    """How many rows have a label differs between the lengths, too."""

    def block(hidden, weight, bias, token_weights, labels):
        loss = linear_cross_entropy(
            hidden * 2, weight, labels, bias, token_weights=token_weights, reduction=reduction, **options
        )
        return (loss * 3).sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (5, 19):
        tensors, labels = operands(length, 8, 33, torch.float32)
        labels[0] = 1
        inputs = [*tensors.values(), torch.rand(length)]
        eager, graph = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
        want, got = block(*eager, labels), compiled(*graph, labels)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        for a, b in zip(eager, graph):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-6)


def test_compiles_under_autocast_and_with_a_frozen_weight() -> None:
    tensors, labels = operands(9, 8, 33, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def graph(hidden, weight, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(hidden, weight, labels)

    hidden = tensors["hidden"].requires_grad_()
    loss = graph(hidden, tensors["weight"], labels)
    want = reference.linear_cross_entropy(hidden.bfloat16(), tensors["weight"].bfloat16(), labels)
    assert torch.equal(loss, want)
    got = torch.autograd.grad(loss, hidden)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, hidden)[0], rtol=1e-2, atol=1e-6)


def test_mistakes_are_found_inside_a_graph_too() -> None:
    graph = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"0\.\.32 .*got 33"):
        graph(torch.zeros(2, 8), torch.zeros(33, 8), torch.tensor([1, 33]))


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_shapes_are_known_without_data(device) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else torch.device("meta"):
        hidden = torch.empty(6, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(33, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(6, dtype=torch.int64, device=device)
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", num_labelled=3)
        assert (losses.shape, losses.dtype, losses.device.type) == ((6,), torch.float32, device)
        if device == "cuda":  # autograd itself asks for the GPU
            return
        grads = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (hidden, weight)]


def test_the_float32_sum_of_half_products_is_one_call_on_a_gpu() -> None:
    """Its overload exists and takes these operands; the numbers are for a GPU."""
    from trichord_kernels.reference.linear_cross_entropy_chunks import add_product

    with FakeTensorMode():
        total = torch.empty(33, 8, device="cuda")
        a, b = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((6, 40), (6, 8)))
        add_product(total, a[:, :33].t(), b)


@pytest.mark.parametrize("which", ["weight", "labels"])
def test_operands_on_two_devices(which) -> None:
    tensors = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(9, 8), "labels": torch.zeros(2, dtype=torch.int64)}
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        op.linear_cross_entropy(**tensors)
