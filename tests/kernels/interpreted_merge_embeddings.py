"""merge_embeddings' Triton kernels, run by Triton's interpreter (see interpreted_rms_norm.py). Rows are moved, so every
result must be the reference's to the bit."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import LAYOUTS, in_layout, judge

from trichord_kernels import merge_embeddings, reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.errors import KernelError
from trichord_kernels.ops import merge_embeddings as op

LEAST_CASES = 40
# T, M, D, features without a place
SIZES = [(9, 4, 41, 0), (67, 33, 72, 5), (5, 5, 24, 0), (1, 1, 1, 0), (7, 0, 16, 0), (0, 0, 8, 0), (0, 3, 8, 3)]
SIZES += [(6, 3, 40, 3), (3, 9, 100, 6)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _positions(num_rows: int, num_features: int, num_absent: int, dtype=torch.int32) -> torch.Tensor:
    placed = torch.randperm(num_rows)[: num_features - num_absent]
    absent = torch.randint(-5, 0, (num_absent,))
    return torch.cat([placed, absent])[torch.randperm(num_features)].to(dtype)


def _run(function, embeds, features, positions, grad) -> dict[str, torch.Tensor]:
    operands = (embeds, features, positions, grad)
    before = [t.clone() for t in operands]
    leaves = [t.detach().requires_grad_() for t in (embeds, features)]
    out = function(*leaves, positions)
    out.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(before, operands)), "an input or incoming gradient was changed"
    return {"out": out.detach(), "grad_embeds": leaves[0].grad, "grad_features": leaves[1].grad}


def _judge(embeds, features, positions, grad, record_property) -> None:
    ours = _run(merge_embeddings, embeds, features, positions, grad)
    plain = _run(reference.merge_embeddings, embeds, features, positions, grad)
    exact = _run(reference.merge_embeddings, embeds.double(), features.double(), positions, grad.double())
    record_property("worst_error_ratio", max(r.ratio for r in judge(ours, plain, exact)))
    again = _run(merge_embeddings, embeds, features, positions, grad)
    for name in ours:
        assert torch.equal(ours[name], plain[name]), name
        assert torch.equal(ours[name], again[name]), name
    assert ours["out"].is_contiguous()


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_take_their_places(size, dtype, record_property) -> None:
    num_rows, num_features, width, num_absent = size
    embeds, features, grad = (torch.randn(n, width).to(dtype) for n in (num_rows, num_features, num_rows))
    positions = _positions(num_rows, num_features, num_absent)
    _judge(embeds, features, positions, grad, record_property)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_poisoned_surroundings(layout, index_dtype, record_property) -> None:
    embeds, features, grad = (in_layout(torch.randn(n, 40), layout) for n in (11, 6, 11))
    positions = torch.full((12,), -(2**20), dtype=index_dtype)[::2].copy_(_positions(11, 6, 2, index_dtype))
    assert positions.stride() == (2,)
    _judge(embeds, features, positions, grad, record_property)


def test_incoming_gradient_of_stride_0(record_property) -> None:
    grad = torch.ones(()).expand(9, 41)  # what .sum().backward() sends
    _judge(torch.randn(9, 41), torch.randn(4, 41), _positions(9, 4, 1), grad, record_property)


def test_rows_that_are_replaced_are_never_read() -> None:
    """What an embedding table holds at a placeholder token must not matter; nor a feature without a place."""
    embeds, features, grad = torch.randn(9, 40), torch.randn(4, 40), torch.randn(9, 40)
    positions = torch.tensor([7, -1, 0, 3])
    embeds[positions[positions >= 0]] = float("nan")
    features[1] = float("nan")
    ours = _run(merge_embeddings, embeds.nan_to_num(), features.nan_to_num(), positions, grad)
    assert torch.equal(merge_embeddings(embeds, features, positions), ours["out"])
    grad[positions[positions >= 0]] = float("nan")
    leaf = embeds.clone().requires_grad_()
    merge_embeddings(leaf, features, positions).backward(grad)
    assert torch.equal(leaf.grad, ours["grad_embeds"])


@pytest.mark.parametrize("frozen", ["embeds", "features"])
def test_one_side_without_gradient(frozen) -> None:
    operands = {"embeds": torch.randn(9, 40), "features": torch.randn(4, 40)}
    positions, grad = _positions(9, 4, 1), torch.randn(9, 40)
    want = _run(merge_embeddings, *operands.values(), positions, grad)
    (wanted,) = operands.keys() - {frozen}
    operands[wanted].requires_grad_()
    merge_embeddings(*operands.values(), positions).backward(grad)
    assert operands[frozen].grad is None
    assert torch.equal(operands[wanted].grad, want[f"grad_{wanted}"])


def test_writes_nothing_around_its_outputs(monkeypatch) -> None:
    buffers = []

    def inside_a_buffer(shape):
        count = torch.Size(shape).numel()
        buffers.append((torch.full((count + 4096,), 7.0), count))
        return buffers[-1][0][2048 : 2048 + count].view(shape)

    monkeypatch.setattr(op, "_forward_outputs", lambda embeds: inside_a_buffer(embeds.shape))
    monkeypatch.setattr(
        op, "_backward_outputs", lambda grad, positions, *_: (inside_a_buffer((9, 41)), inside_a_buffer((4, 41)))
    )
    _run(merge_embeddings, torch.randn(9, 41), torch.randn(4, 41), _positions(9, 4, 1), torch.randn(9, 41))
    assert len(buffers) == 3
    for buffer, count in buffers:
        assert (buffer[:2048] == 7).all()
        assert (buffer[2048 + count :] == 7).all()


def test_opcheck() -> None:
    embeds, features = torch.randn(9, 24, requires_grad=True), torch.randn(24, 4).t().requires_grad_()
    positions = _positions(9, 4, 1)
    torch.library.opcheck(op.merge_embeddings_forward, (embeds, features, positions))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(op.merge_embeddings_backward, (torch.randn(9, 24), positions, *wanted))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    compiled = torch.compile(lambda e, f, p: merge_embeddings(e * 2, f, p) * 3, fullgraph=True, backend="aot_eager")
    for num_rows, num_features in ((9, 4), (21, 8)):
        embeds, features = torch.randn(num_rows, 24), torch.randn(num_features, 24)
        positions, grad = _positions(num_rows, num_features, 2), torch.randn(num_rows, 24)
        got = _run(compiled, embeds, features, positions, grad)
        want = _run(lambda e, f, p: merge_embeddings(e * 2, f, p) * 3, embeds, features, positions, grad)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        (torch.zeros(2, 8).double(), ["float32, bfloat16 and float16", "float64"]),
        (torch.zeros(2, 8, device="meta"), ["one device", "cpu", "meta"]),
    ],
)
def test_refuses_what_it_does_not_cover(embeds, words) -> None:
    with pytest.raises(KernelError) as caught:
        op.merge_embeddings_forward._init_fn(embeds, torch.zeros(1, 8, dtype=embeds.dtype), torch.zeros(1).long())
    assert all(word in str(caught.value) for word in words), caught.value
