"""The plain-torch twin: torch's numbers, exact gradients, no more than a chunk of logits, clear refusals."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_rule import OPTIONS, judge_loss, operands, plain, run_with_grads
from torch.utils._python_dispatch import TorchDispatchMode

from trichord_kernels import linear_cross_entropy as public
from trichord_kernels.reference import linear_cross_entropy
from trichord_kernels.reference import linear_cross_entropy_chunks as chunks
from trichord_kernels.tables import linear_cross_entropy as tables


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def few_rows(monkeypatch) -> None:
    """Chunks of at most 4 rows."""
    monkeypatch.setattr(tables, "CPU_CHUNK", tables.Chunk(2**26, 4, "test"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 2), (5, 7, 33), (33, 16, 64)], ids=str)
def test_error_rule(shape, dtype, options, few_rows) -> None:
    judge_loss(*operands(*shape, dtype), options | {"reduction": "none"})


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_torch(reduction, label_smoothing, few_rows) -> None:
    tensors, labels = operands(19, 8, 40, torch.float64)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    want = F.cross_entropy(F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]), labels, **options)
    got = linear_cross_entropy(labels=labels, **tensors, **options)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_exact(options, reduction, few_rows) -> None:
    tensors, labels = operands(7, 3, 9, torch.float64)
    labels[0] = 1
    leaves = [t.requires_grad_() for t in (*tensors.values(), torch.rand(7, dtype=torch.float64) + 0.5)]

    def loss(hidden, weight, bias, token_weights):
        return linear_cross_entropy(
            hidden, weight, labels, bias, token_weights=token_weights, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_many_blocks_of_rows(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_BLOCK_LOGITS", 80)
    judge_loss(*operands(19, 8, 40, torch.float32), OPTIONS["all"])


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_costs_no_digits(offset) -> None:
    """Whole numbers with the offset are exact in float32, so the result must be as without it."""
    hidden, weight = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (40, 4)).float()
    labels, options = torch.randint(0, 40, (9,)), {"label_smoothing": 0.1, "reduction": "none"}
    got = judge_loss({"hidden": hidden, "weight": weight, "bias": torch.full((40,), offset)}, labels, options)
    want = run_with_grads(plain, {"hidden": hidden, "weight": weight}, labels, torch.ones(9), options)
    torch.testing.assert_close(got["loss"], want["loss"], rtol=2e-6, atol=2e-6)


class _Recorder(TorchDispatchMode):
    """The largest result of any torch operation, and how many matrix products there were."""

    largest, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


def test_never_more_logits_than_a_chunk(few_rows) -> None:
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    labels = torch.randint(0, 300, (64,))
    with _Recorder() as ours:
        linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=0.1, softcap=3.0).backward()
    assert ours.largest == weight.numel()  # 2400; a chunk is 1200
    with _Recorder() as plainly:
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    assert plainly.largest == 64 * 300


def test_rows_without_a_label_never_meet_the_weight() -> None:
    tensors, labels = operands(13, 8, 40, torch.float32)
    poisoned = tensors | {"hidden": tensors["hidden"].masked_fill((labels == -100)[:, None], float("nan"))}
    poisoned["token_weights"] = torch.ones(13).masked_fill(labels == -100, float("nan"))
    grad = torch.randn(13)
    want = run_with_grads(public, tensors, labels, grad, {"reduction": "none"})
    got = run_with_grads(public, poisoned, labels, grad, {"reduction": "none"})
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_saves_the_parameter_itself_and_two_numbers_per_row() -> None:
    tensors, labels = operands(13, 8, 40, torch.float32)
    hidden, weight = tensors["hidden"].requires_grad_(), torch.nn.Parameter(tensors["weight"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    assert any(t is weight for t in saved)
    own = [t for t in saved if t.data_ptr() not in (weight.data_ptr(), hidden.data_ptr(), labels.data_ptr())]
    assert sum(t.numel() for t in own) <= 3 * 13  # two numbers per row, and which rows


def test_weight_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    tensors, labels = operands(9, 8, 40, torch.float32)
    hidden, full = tensors["hidden"].requires_grad_(), tensors["weight"]
    weight = torch.nn.Parameter(full.clone())
    loss = public(hidden, weight, labels)
    weight.data = torch.empty(0)
    weight.data = full.clone()
    got = torch.autograd.grad(loss, (hidden, weight))
    weight = torch.nn.Parameter(full.clone())
    want = torch.autograd.grad(public(hidden, weight, labels), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_frozen_operands_cost_no_product() -> None:
    tensors, labels = operands(9, 8, 40, torch.float32)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    counts = []
    for h, w in ((hidden, weight), (hidden, weight.detach()), (hidden.detach(), weight)):
        loss = linear_cross_entropy(h, w, labels)
        with _Recorder() as recorder:
            loss.backward()
        counts.append(recorder.products)
    assert counts == [3, 2, 2]  # the logits again, d_hidden, d_weight


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_row_has_a_label(reduction) -> None:
    tensors, _ = operands(5, 8, 40, torch.float32)
    labels = torch.full((5,), -100)
    grad = torch.ones((5,) if reduction == "none" else ())
    for options in ({}, {"num_labelled": 0}):
        found = run_with_grads(public, tensors, labels, grad, options | {"reduction": reduction})
        assert len(found) == 4
        assert not any(value.any() for value in found.values())
    weights = {"token_weights": torch.rand(5)}
    assert public(labels=labels, **tensors, **weights, reduction=reduction).eq(0).all()


def test_every_weight_is_zero() -> None:
    tensors, labels = operands(5, 8, 40, torch.float32)
    assert public(labels=labels, **tensors, token_weights=torch.zeros(5), reduction="mean") == 0


def test_float32_gradient_of_a_half_weight_is_rounded_once(few_rows) -> None:
    """Summed in float16 chunk by chunk, small gradients would drown in the sum so far."""
    hidden, weight = torch.ones(2048, 1).half(), torch.zeros(3, 1).half().requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64), reduction="sum").backward()
    per_row = torch.tensor([-2 / 3, 1 / 3, 1 / 3]).half()
    assert torch.equal(weight.grad[:, 0], (2048 * per_row.float()).half())


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32() -> None:
    tensors, labels = operands(9, 8, 33, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", dtype=torch.bfloat16), keep:
        loss = linear_cross_entropy(labels=labels, **leaves)
    half = {name: t.detach().bfloat16().requires_grad_() for name, t in leaves.items()}
    want = linear_cross_entropy(labels=labels, **half)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    assert any(t is leaves["weight"] for t in saved)
    got = torch.autograd.grad(loss, leaves.values())
    assert [g.dtype for g in got] == [torch.float32] * 3
    for g, w in zip(got, torch.autograd.grad(want, half.values())):
        torch.testing.assert_close(g, w.float(), rtol=1e-2, atol=1e-6)


def test_chunks_are_even_and_bounded() -> None:
    assert tables.chunk_rows("sm_90", 8192, 2 * 151936) == 1639  # 5 chunks; 1766 rows would be 512 MiB
    assert tables.chunk_rows("sm_90", 8192, 2 * 32000) == 2048
    assert tables.chunk_rows("cpu", 3282, 4 * 32768) == 469
    assert tables.chunk_rows("cpu", 0, 4) == tables.chunk_rows("cpu", 5, 2**40) == 1


def test_products_are_added_in_the_dtype_of_the_sum() -> None:
    total, a, b = torch.ones(3, 2), torch.randn(3, 4).half(), torch.randn(4, 2).half()
    chunks.add_product(total, a, b)
    assert torch.equal(total, torch.addmm(torch.ones(3, 2), a.float(), b.float()))


H, W, Y = torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((torch.zeros(2, 3, 8), W, Y), {}, ["(2, 3, 8)", "(9, 8)", "flatten"]),
        ((H, torch.zeros(9, 7), Y), {}, ["(2, 8)", "(9, 7)"]),
        ((H, torch.zeros(0, 8), Y), {}, ["V >= 1", "(0, 8)"]),
        ((H, W, Y[:1]), {}, ["(2,) int64", "(1,)"]),
        ((H, W, Y.int()), {}, ["int64", "int32", ".long()"]),
        ((H, W, Y, torch.zeros(8)), {}, ["bias (9,)", "(8,)"]),
        ((H, W.half(), Y), {}, ["one dtype", "float16", "float32", "autocast"]),
        ((H, W, Y), {"token_weights": torch.ones(3)}, ["token_weights (2,)", "(3,)"]),
        ((H, W, Y), {"token_weights": Y}, ["floating", "int64"]),
        ((H, W, Y), {"reduction": "avg"}, ["none, sum, mean", "'avg'"]),
        ((H, W, Y), {"label_smoothing": 1.5}, ["0..1", "1.5"]),
        ((H, W, Y), {"softcap": 0.0}, ["above 0", "0.0"]),
        ((H, W, Y), {"num_labelled": -1}, ["at least 0", "-1"]),
        ((H, W, Y), {"num_labelled": 1}, ["got 1 for 2 rows"]),
        ((H, W, Y + 9), {}, ["0..8", "V = 9", "got 9"]),
        ((H, W, Y - 1), {}, ["0..8", "got -1"]),
    ],
)
def test_refuses_what_does_not_fit(arguments, options, words) -> None:
    for function in (linear_cross_entropy, public):
        with pytest.raises(ValueError, match="linear_cross_entropy: expected") as caught:
            function(*arguments, **options)
        assert all(word in str(caught.value) for word in words), caught.value
