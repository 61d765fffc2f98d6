"""RMSNorm's Triton kernels, run by Triton's interpreter on the CPU.

Not collected by a plain `pytest`: TRITON_INTERPRET must be set before triton is imported and would spoil the
ahead-of-time compilations of the same process. `test_kernels_interpreter.py` runs this file in its own process.
float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rule import LAYOUTS, in_layout, judge, run_with_grads, sum_floor

from trichord_kernels import reference, rms_norm
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops import rms_norm as op

LEAST_CASES = 75
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
SHAPES = [(5, 123), (3, 7, 41), (1, 1), (2, 8192), (67, 64), (3, 1000), (1, 4104), (4,), (2, 0, 8)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _operands(shape, dtype, has_residual, weight_dtype=None):
    x, residual, grad, grad_new_residual = (torch.randn(shape).to(dtype) for _ in range(4))
    inputs = {"x": x, "weight": torch.randn(shape[-1]).to(weight_dtype or dtype)}
    inputs["residual"] = residual if has_residual else None
    return inputs, (grad, grad_new_residual if has_residual else None)


def _judge(inputs, grads, record_property=None):
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    wide_grads = tuple(None if t is None else t.double() for t in grads)
    ours = run_with_grads(rms_norm, inputs, EPS, grads)
    plain = run_with_grads(reference.rms_norm, inputs, EPS, grads)
    exact = run_with_grads(reference.rms_norm, wide, EPS, wide_grads)
    h = wide["x"] if wide["residual"] is None else exact["new_residual"]
    normed = reference.rms_norm(h, torch.ones(h.shape[-1]).double(), EPS)
    terms = (wide_grads[0] * normed).reshape(-1, h.shape[-1])
    ratios = judge(ours, plain, exact, {"grad_weight": sum_floor(terms)})
    if record_property:
        record_property("worst_error_ratio", max(r.ratio for r in ratios))
    again = run_with_grads(rms_norm, inputs, EPS, grads)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the second run gave other bits"
    return ours


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype, has_residual, record_property) -> None:
    _judge(*_operands(shape, dtype, has_residual), record_property)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts_and_poisoned_surroundings(layout, has_residual, record_property) -> None:
    inputs, grads = _operands((5, 24), torch.float16, has_residual)
    for name in ("x", "residual"):
        if inputs[name] is not None:
            inputs[name] = in_layout(inputs[name], layout)
    inputs["weight"] = in_layout(inputs["weight"][None], "unaligned")[0]
    _judge(inputs, grads, record_property)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradient_layouts(layout, record_property) -> None:
    inputs, grads = _operands((5, 123), torch.float32, True)
    _judge(inputs, (in_layout(grads[0], layout), in_layout(grads[1], layout)), record_property)


def test_incoming_gradients_of_stride_0(record_property) -> None:
    inputs, _ = _operands((3, 5, 123), torch.float32, True)
    one = torch.ones(()).expand(3, 5, 123)  # what .sum().backward() sends
    _judge(inputs, (one, one), record_property)


def test_permuted_leading_axes(record_property) -> None:
    inputs, grads = _operands((3, 7, 41), torch.float32, True)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    _judge(inputs, grads, record_property)


@pytest.mark.parametrize("has_residual", [False, True])
def test_weight_gradient_over_several_tiles_per_program(has_residual, monkeypatch, record_property) -> None:
    monkeypatch.setattr(op, "MAX_PARTIAL_SUMS", 3)
    rows = 7 * op.row_tile(123, False, "cpu").block_rows + 5  # 8 tiles, the last one ragged, on 3 programs
    _judge(*_operands((rows, 123), torch.float32, has_residual), record_property)


def test_float32_weight_with_half_activations(record_property) -> None:
    ours = _judge(*_operands((5, 123), torch.float16, True, weight_dtype=torch.float32), record_property)
    assert ours["out"].dtype == torch.float16
    assert ours["grad_weight"].dtype == torch.float32


def test_rounds_where_llama_rounds() -> None:
    """Without the rounding before the weight about a fifth of the float16 results differ from the torch path."""
    x, weight = torch.randn(64, 512).half(), torch.randn(512).half()
    differing = (rms_norm(x, weight) != reference.rms_norm(x, weight)).float().mean().item()
    assert differing < 0.01, f"{differing:.3f} of the results differ from Llama's rounding"


@pytest.mark.parametrize("used", ["out", "new_residual"])
def test_only_one_output_used(used) -> None:
    inputs, grads = _operands((5, 123), torch.float32, True)
    found = []
    for function in (rms_norm, reference.rms_norm):
        leaves = [inputs[name].detach().requires_grad_() for name in ("x", "weight", "residual")]
        out, new_residual = function(leaves[0], leaves[1], EPS, leaves[2])
        (out if used == "out" else new_residual).backward(grads[0])
        found.append([torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=0, atol=5e-6)


def test_frozen_weight_or_input() -> None:
    x, weight = torch.randn(5, 123), torch.randn(123)
    rms_norm(x.requires_grad_(), weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    weight = weight.requires_grad_()
    rms_norm(x.detach(), weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("has_residual", [False, True])
def test_writes_nothing_around_its_outputs(has_residual, monkeypatch) -> None:
    buffers = []

    def inside_a_buffer(shape, dtype):
        count = torch.Size(shape).numel()
        buffers.append((torch.full((count + 4096,), 7.0, dtype=dtype), count))
        return buffers[-1][0][2048 : 2048 + count].view(shape)

    def forward_outputs(x, residual):
        return inside_a_buffer(x.shape, x.dtype), inside_a_buffer((0,) if residual is None else x.shape, x.dtype)

    def backward_outputs(h, weight, weight_grad):
        return inside_a_buffer(h.shape, h.dtype), inside_a_buffer(weight.shape, weight.dtype)

    monkeypatch.setattr(op, "_forward_outputs", forward_outputs)
    monkeypatch.setattr(op, "_backward_outputs", backward_outputs)
    inputs, grads = _operands((21, 123), torch.float32, has_residual)
    run_with_grads(rms_norm, inputs, EPS, grads)
    assert len(buffers) == 4
    for buffer, count in buffers:
        assert (buffer[:2048] == 7).all()
        assert (buffer[2048 + count :] == 7).all()


def test_weight_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    full, grad = torch.randn(123), torch.randn(5, 123)
    x, weight = torch.randn(5, 123).requires_grad_(), torch.nn.Parameter(full.clone())
    out = rms_norm(x, weight)
    weight.data = torch.empty(0)
    weight.data = full.clone()
    out.backward(grad)
    x2, weight2 = x.detach().requires_grad_(), torch.nn.Parameter(full.clone())
    rms_norm(x2, weight2).backward(grad)
    assert torch.equal(x.grad, x2.grad)
    assert torch.equal(weight.grad, weight2.grad)
    x.grad = None
    out = rms_norm(x, weight)
    weight.data = torch.zeros(123)  # so the backward really reads the Parameter, not a copy made in forward
    out.backward(grad)
    assert not x.grad.any()


@pytest.mark.parametrize("has_residual", [False, True])
def test_opcheck(has_residual) -> None:
    x, residual, grad = (torch.randn(6, 5, 24).transpose(0, 1).requires_grad_() for _ in range(3))
    weight = torch.randn(24, requires_grad=True)
    residual = residual if has_residual else None
    torch.library.opcheck(op.rms_norm_forward, (x, weight, residual, EPS))
    detached = [None if t is None else t.detach() for t in (grad, residual, x, weight)]
    for weight_grad in (False, True):
        torch.library.opcheck(op.rms_norm_backward, (*detached, EPS, weight_grad))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def block(x, weight, residual):
        out, new_residual = rms_norm(x * 2, weight, EPS, residual)
        return rms_norm(out, weight, EPS) + new_residual

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        inputs = [torch.randn(length, 24), torch.randn(24), torch.randn(length, 24)]
        eager, graph = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
        want, got = block(*eager), compiled(*graph)
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(want, got)
        for a, b in zip(eager, graph):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(autocast_dtype) -> None:
    x, weight, residual = torch.randn(5, 123).half(), torch.randn(123), torch.randn(5, 123)
    with torch.autocast("cpu", dtype=autocast_dtype):
        out, new_residual = rms_norm(x, weight, EPS, residual)
    assert out.dtype == new_residual.dtype == torch.float32
    want, _ = rms_norm(x.float(), weight, EPS, residual)
    assert torch.equal(out, want)


def test_outputs_are_new_tensors() -> None:
    x, weight = torch.randn(5, 24), torch.randn(24)
    out, new_residual = rms_norm(x, weight, EPS, torch.zeros(5, 24))
    assert len({t.untyped_storage().data_ptr() for t in (x, weight, out, new_residual)}) == 4


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.zeros(2, 8193), torch.zeros(8193), ["8192", "8193", "TRICHORD_KERNELS=reference"]),
        (torch.zeros(2, 8).double(), torch.zeros(8).double(), ["float32, bfloat16 and float16", "float64"]),
        (torch.zeros(2, 0), torch.zeros(0), ["1 to 8192", "got 0"]),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), ["one device", "cpu", "meta"]),
    ],
)
def test_refuses_what_it_does_not_cover(x, weight, words) -> None:
    with pytest.raises(ValueError) as caught:
        rms_norm(x, weight)
    assert all(word in str(caught.value) for word in words), caught.value
