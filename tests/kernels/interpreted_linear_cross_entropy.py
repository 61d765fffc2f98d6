"""The Triton kernels of linear_cross_entropy, run by Triton's interpreter on the CPU.

Not collected by a plain `pytest`; `test_kernels_interpreter.py` runs this file in its own process. float32 and float16
only: the interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rule import LAYOUTS, in_layout
from linear_cross_entropy_rule import OPTIONS, judge_loss, operands, plain, run_with_grads

from trichord_kernels import linear_cross_entropy
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops import linear_cross_entropy as op
from trichord_kernels.reference import linear_cross_entropy_chunks as chunks
from trichord_kernels.tables import linear_cross_entropy as tables

LEAST_CASES = 80
DTYPES = [torch.float32, torch.float16]
SHAPES = [(5, 7, 33), (1, 1, 1), (1, 8, 100), (9, 16, 64), (13, 24, 97), (3, 40, 8)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on rows whose result is not used


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def few_rows(monkeypatch) -> None:
    """Chunks of at most 4 rows."""
    monkeypatch.setattr(tables, "CPU_CHUNK", tables.Chunk(2**26, 4, "test"))


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 33), (9, 16, 64)], ids=str)
def test_error_rule_of_every_option(shape, dtype, options, record_property) -> None:
    judge_loss(*operands(*shape, dtype), options | {"reduction": "none"}, record_property=record_property)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule_of_every_reduction(shape, reduction, few_rows, record_property) -> None:
    tensors, labels = operands(*shape, torch.float32)
    labels[0] = 0  # the plain mean over no label is 0 / 0
    tensors["token_weights"] = torch.rand(shape[0]) + 0.5
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction}
    judge_loss(tensors, labels, options, record_property=record_property)


@pytest.mark.parametrize("num_labelled", ["exact", "more", "all", None])
def test_dropped_rows_make_no_difference(num_labelled, few_rows, record_property) -> None:
    tensors, labels = operands(13, 8, 40, torch.float32)
    count = int((labels != -100).sum())
    assert 0 < count < 11
    number = {"exact": count, "more": count + 2, "all": 13, None: None}[num_labelled]
    judge_loss(tensors, labels, {"num_labelled": number, "reduction": "none"}, record_property=record_property)


def test_too_few_rows_kept_give_nan() -> None:
    tensors, labels = operands(13, 8, 40, torch.float32)
    count = int((labels != -100).sum())
    assert linear_cross_entropy(labels=labels, **tensors, num_labelled=count - 1).isnan()
    assert linear_cross_entropy(labels=labels, **tensors, num_labelled=count).isfinite()


@pytest.mark.parametrize("num_labelled", [0, 3, None])
def test_no_row_has_a_label(num_labelled) -> None:
    tensors, _ = operands(5, 8, 40, torch.float32)
    labels = torch.full((5,), -100)
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "num_labelled": num_labelled}
        shape = (5,) if reduction == "none" else ()
        found = run_with_grads(linear_cross_entropy, tensors, labels, torch.ones(shape), options)
        assert len(found) == 4
        assert not any(value.any() for value in found.values())


def test_no_rows() -> None:
    tensors, labels = operands(0, 8, 40, torch.float32)
    found = run_with_grads(linear_cross_entropy, tensors, labels, torch.ones(()), {})
    assert {name: value.shape for name, value in found.items() if name != "loss"} == {
        f"grad_{name}": t.shape for name, t in tensors.items()
    }
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("num_labelled", [None, "more"])
def test_rows_without_a_label_may_hold_anything(num_labelled, few_rows) -> None:
    tensors, labels = operands(13, 8, 40, torch.float32)
    grad = torch.randn(13)
    number = None if num_labelled is None else int((labels != -100).sum()) + 2
    options = {"reduction": "none", "num_labelled": number, "z_loss": 1e-3}
    want = run_with_grads(linear_cross_entropy, tensors, labels, grad, options)
    for value in (float("nan"), float("inf")):
        poisoned = tensors | {"hidden": tensors["hidden"].masked_fill((labels == -100)[:, None], value)}
        got = run_with_grads(linear_cross_entropy, poisoned, labels, grad.masked_fill(labels == -100, value), options)
        assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_input_layouts(name, layout, record_property) -> None:
    tensors, labels = operands(9, 24, 40, torch.float32)
    tensors[name] = in_layout(tensors[name], layout)
    judge_loss(tensors, labels, {"reduction": "none", "num_labelled": 9}, record_property=record_property)


def test_strided_labels_weights_bias_and_gradient(record_property) -> None:
    tensors, labels = operands(9, 24, 40, torch.float32)
    wide = torch.stack((labels, labels), 1)
    tensors |= {"bias": torch.randn(80)[::2], "token_weights": torch.rand(18)[::2] + 0.1}
    grad = torch.randn(18)[::2]
    judge_loss(tensors, wide[:, 1], {"reduction": "none"}, grad, record_property)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_incoming_gradient_of_stride_0(reduction, record_property) -> None:
    tensors, labels = operands(9, 8, 40, torch.float32)
    one = torch.ones(()).expand(9) if reduction == "none" else torch.ones(())
    judge_loss(tensors, labels, {"reduction": reduction}, one, record_property)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smooth"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_costs_no_digits(offset, options, record_property) -> None:
    """Whole numbers with the offset are exact in float32, so the result must be as without it."""
    hidden, weight = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (40, 4)).float()
    labels = torch.randint(0, 40, (9,))
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.full((40,), offset)}
    got = judge_loss(tensors, labels, options | {"reduction": "none"}, torch.ones(9), record_property)
    want = run_with_grads(
        plain, {"hidden": hidden, "weight": weight}, labels, torch.ones(9), options | {"reduction": "none"}
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-6)


def test_a_label_far_below_the_others(record_property) -> None:
    """exp relative to the label's logit would overflow at 88, and lose the others' digits before."""
    tensors = {"hidden": torch.eye(4) * 300, "weight": torch.randn(40, 4)}
    labels = (tensors["hidden"] @ tensors["weight"].t()).argmin(1)
    ours = judge_loss(tensors, labels, {"reduction": "none"}, record_property=record_property)
    assert (ours["loss"] > 100).all()


@pytest.mark.parametrize("ignore_index", [0, 3, -1])
def test_other_ignore_index(ignore_index, record_property) -> None:
    tensors, labels = operands(9, 8, 5, torch.float32)
    labels = labels.clamp(min=0)
    labels[::3] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": "none"}
    judge_loss(tensors, labels, options, record_property=record_property)


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan(label) -> None:
    tensors, labels = operands(3, 8, 40, torch.float32)
    labels = torch.tensor([1, label, -100])
    losses = linear_cross_entropy(labels=labels, **tensors, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]


def test_frozen_operands_get_no_gradient(monkeypatch) -> None:
    tensors, labels = operands(9, 8, 40, torch.float32)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    products = []
    add_product = chunks.add_product
    monkeypatch.setattr(chunks, "add_product", lambda *args: (products.append(1), add_product(*args)))
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert not products
    assert hidden.grad is not None
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert products
    assert weight.grad is not None


def test_writes_nothing_outside_its_rows(monkeypatch, few_rows) -> None:
    """The logits buffer is wider than the vocabulary; rows of other chunks and what lies behind stay as they are."""
    buffer = torch.full((6, 48), 7.0)
    logits = buffer[1:5, :41]
    logits.copy_(torch.randn(4, 41))
    options = chunks.LossOptions(-100, 0.1, 0.0, None)
    labels, grad = torch.tensor([0, 40, -100, 7]), torch.ones(4)
    loss, top, log_sum = op._row_losses(logits, labels, options)
    assert (buffer[:, 41:] == 7).all()
    op._logits_to_gradient(logits, labels, grad, top, log_sum, options)
    assert (buffer[[0, 5]] == 7).all()
    assert not logits[2].any()
    assert loss.shape == (4,)


def test_weight_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    tensors, labels = operands(9, 8, 40, torch.float32)
    hidden, full = tensors["hidden"].requires_grad_(), tensors["weight"]
    weight = torch.nn.Parameter(full.clone())
    loss = linear_cross_entropy(hidden, weight, labels)
    weight.data = torch.empty(0)
    weight.data = full.clone()
    got = torch.autograd.grad(loss, (hidden, weight))
    weight = torch.nn.Parameter(full.clone())
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    loss = linear_cross_entropy(hidden, weight, labels)
    weight.data = torch.zeros(40, 8)  # so the backward really reads the Parameter, not a copy made in forward
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_opcheck() -> None:
    tensors, labels = operands(6, 8, 33, torch.float32)
    labels[2:] = -100  # at most the 4 rows that are kept
    hidden, weight, bias = (tensors[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    options = (-100, 0.1, 1e-3, 5.0, 4, None)
    torch.library.opcheck(
        op.linear_cross_entropy_forward, (hidden.t().contiguous().t(), weight, labels, bias, *options)
    )
    torch.library.opcheck(op.linear_cross_entropy_forward, (hidden, weight, labels, None, *options))
    _, statistics = op.linear_cross_entropy_forward(hidden, weight, labels, bias, *options)
    detached = [t.detach() for t in (torch.randn(6), hidden, weight, labels, bias, statistics)]
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(op.linear_cross_entropy_backward, (*detached, *options, *needed))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def block(hidden, weight, bias, labels):
        return linear_cross_entropy(hidden * 2, weight, labels, bias, softcap=5.0, reduction="mean") * 3

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        tensors, labels = operands(length, 8, 33, torch.float32)
        labels[0] = 1
        eager, graph = ([t.clone().requires_grad_() for t in tensors.values()] for _ in range(2))
        want, got = block(*eager, labels), compiled(*graph, labels)
        want.backward()
        got.backward()
        assert torch.equal(want, got)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, graph))


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32() -> None:
    tensors, labels = operands(9, 8, 33, torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(labels=labels, **tensors)
    half = [t.detach().half().requires_grad_() for t in leaves]
    want = linear_cross_entropy(half[0], half[1], labels, half[2])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    got = torch.autograd.grad(loss, leaves)
    assert [g.dtype for g in got] == [torch.float32] * 3
    for g, w in zip(got, torch.autograd.grad(want, half)):
        torch.testing.assert_close(g, w.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((torch.zeros(2, 8).double(), torch.zeros(9, 8).double()), ["float32, bfloat16 and float16", "float64"]),
        ((torch.zeros(2, 8), torch.zeros(9, 8, device="meta")), ["one device", "cpu", "meta"]),
    ],
    ids=["dtype", "device"],
)
def test_refuses_what_it_does_not_cover(tensors, words) -> None:
    with pytest.raises(ValueError) as caught:
        linear_cross_entropy(*tensors, torch.zeros(2, dtype=torch.int64))
    assert all(word in str(caught.value) for word in words), caught.value
