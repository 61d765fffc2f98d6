"""fuse_modalities' Triton kernels, run by Triton's interpreter (see interpreted_rms_norm.py)."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import judge_call, make_call, map_tensors, run_with_grads, tensors_of
from kernel_rule import LAYOUTS, in_layout

from trichord_kernels import fuse_modalities, reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops import fuse_modalities as op
from trichord_kernels.ops import fuse_modalities_backward as backward

LEAST_CASES = 90
FLOAT, HALF = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _judge(call, record_property=None):
    grads = [torch.randn_like(call["inputs"][0]).contiguous() for _ in range(2)]
    ours, ratios = judge_call(fuse_modalities, call, grads)
    if record_property:
        record_property("worst_error_ratio", max(ratio.ratio for ratio in ratios))
    return ours


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize(("residual", "norm"), [(False, None), (True, None), (False, "rms"), (True, "layer")])
@pytest.mark.parametrize(
    ("num_inputs", "factors", "present"),
    [
        (2, "scalar", False),
        (3, "channel", True),
        (5, "mixed", True),
        (2, "gated", False),
        (3, "gated", True),
        (2, "none", False),
        (2, "none", True),
        (8, "channel", False),
    ],
)
def test_error_rule(num_inputs, factors, present, residual, norm, record_property) -> None:
    call = make_call(37, 41, num_inputs, factors, norm, attended=not residual, residual=residual, present=present)
    _judge(call, record_property)


@pytest.mark.parametrize("factors", ["scalar", "channel", "gated"])
@pytest.mark.parametrize("weight_dtype", [FLOAT, HALF])
def test_half_precision(factors, weight_dtype, record_property) -> None:
    call = make_call(37, 72, 2, factors, dtype=HALF, weight_dtype=weight_dtype, present=True)
    ours = _judge(call, record_property)
    assert ours["out"].dtype == HALF
    assert ours["grad_gate_logits" if factors == "gated" else "grad_weights0"].dtype == weight_dtype


@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (2, 8192), (1, 4104), (3, 1000)], ids=str)
def test_shapes(shape, record_property) -> None:
    call = make_call(*shape, 2, "mixed" if shape[1] > 1 else "channel", dtype=HALF)
    grads = [torch.randn_like(call["inputs"][0]) for _ in range(2)]
    _, ratios = judge_call(fuse_modalities, call, grads)
    record_property("worst_error_ratio", max(ratio.ratio for ratio in ratios))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_poisoned_surroundings(layout, record_property) -> None:
    call = make_call(21, 24, 3, "gated", present=True)
    named = ("attended", "residual", "gate_logits")
    call |= {name: in_layout(call[name], layout) for name in named}
    call["inputs"] = [in_layout(x, layout) for x in call["inputs"]]
    call["norm_weight"] = in_layout(call["norm_weight"][None], "unaligned")[0]
    grads = [in_layout(torch.randn(21, 24), layout) for _ in range(2)]
    _, ratios = judge_call(fuse_modalities, call, grads)
    record_property("worst_error_ratio", max(ratio.ratio for ratio in ratios))


def test_incoming_gradients_of_stride_0(record_property) -> None:
    one = torch.ones(()).expand(21, 41)  # what .sum().backward() sends
    _, ratios = judge_call(fuse_modalities, make_call(21, 41, 2, "scalar"), [one, one])
    record_property("worst_error_ratio", max(ratio.ratio for ratio in ratios))


@pytest.mark.parametrize(("num_inputs", "factors"), [(2, "channel"), (3, "scalar"), (8, "channel"), (2, "gated")])
def test_sums_over_several_tiles_per_program(num_inputs, factors, monkeypatch, record_property) -> None:
    """8 inputs' sums do not fit the registers of one pass: the second kernel makes them."""
    monkeypatch.setattr(backward, "MAX_PARTIAL_SUMS", 12 if num_inputs == 8 else 2)  # a quarter for the second kernel
    call = make_call(101, 24, num_inputs, factors, "layer", present=num_inputs == 8)
    _judge(call, record_property)


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("factors", ["none", "mixed", "gated"])
@pytest.mark.parametrize("residual", [False, True])
def test_absent_inputs_are_never_read(factors, norm, residual) -> None:
    call = make_call(9, 41, 3, factors, norm, residual=residual, attended=False, present=True)
    clean = _run(call)
    for i, x in enumerate(call["inputs"]):
        x[~call["present"][:, i]] = float("nan")
    if factors == "gated":
        call["gate_logits"][~call["present"]] = float("nan")
    ours = _run(call)
    for name, want in clean.items():
        assert torch.equal(ours[name], want), name
    row = 9 // 2  # nothing is present there
    z = torch.zeros(41) if not residual else call["residual"][row]
    if norm is None:
        assert torch.equal(ours["out"][row], z)
    for i in range(3):
        assert not ours[f"grad_inputs{i}"][~call["present"][:, i]].any()


def _run(call):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(call["inputs"][0].shape, generator=generator) for _ in range(2)]
    return run_with_grads(fuse_modalities, call, grads)


def test_a_weight_of_0_still_learns() -> None:
    """Weights are not gates: 0 does not mean absent."""
    call = make_call(5, 41, 2, "scalar", None, attended=False, residual=False)
    call["weights"] = [torch.zeros(1), torch.ones(1)]
    grad = torch.randn(5, 41)
    ours = run_with_grads(fuse_modalities, call, [grad])
    want = (grad * call["inputs"][0]).sum()
    torch.testing.assert_close(ours["grad_weights0"][0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_logit", [False, True])
def test_one_present_input_has_weight_1(as_logit) -> None:
    call = make_call(5, 41, 3, "gated", None, attended=False, residual=False)
    present = torch.zeros(5, 3, dtype=torch.bool)
    present[:, 1] = True
    if as_logit:  # a logit of -inf says the same
        call["gate_logits"][~present] = float("-inf")
    else:
        call["present"] = present
    ours = run_with_grads(fuse_modalities, call, [torch.randn(5, 41)])
    assert torch.equal(ours["out"], call["inputs"][1])
    assert not ours["grad_gate_logits"].any()


@pytest.mark.parametrize("factors", ["none", "scalar"])
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_used(used, factors) -> None:
    call = make_call(5, 41, 2, factors, "rms")
    grad, found = torch.randn(5, 41), []
    for function in (fuse_modalities, reference.fuse_modalities):
        leaves = map_tensors(call, lambda t: t.detach().requires_grad_())
        function(**leaves)[used].backward(grad)
        found.append([t.grad if t.grad is not None else torch.zeros(()) for t in tensors_of(leaves).values()])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", ["inputs", "weights", "norm_weight", "residual"])
def test_frozen_operands(frozen) -> None:
    call = make_call(5, 41, 2, "channel", "layer")
    grads = [torch.randn(5, 41) for _ in range(2)]
    want = run_with_grads(fuse_modalities, call, grads)
    leaves = map_tensors(call, lambda t: t.detach().requires_grad_())
    leaves[frozen] = call[frozen]
    torch.autograd.backward(fuse_modalities(**leaves), grads)
    for name, leaf in tensors_of(leaves).items():
        if name.startswith(frozen):
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, want[f"grad_{name}"]), name


def test_same_input_twice() -> None:
    x, w = torch.randn(5, 41, requires_grad=True), torch.randn(41)
    fuse_modalities((x, x), (w, w)).sum().backward()
    torch.testing.assert_close(x.grad, (2 * w).expand(5, 41))


def test_writes_nothing_around_its_outputs(monkeypatch) -> None:
    buffers = []

    def inside_a_buffer(like):
        buffers.append((torch.full((like.numel() + 4096,), 7.0), like.numel()))
        return buffers[-1][0][2048 : 2048 + like.numel()].view(like.shape)

    forward_outputs, backward_outputs = op._forward_outputs, op._backward_outputs
    monkeypatch.setattr(op, "_forward_outputs", lambda *a: tuple(inside_a_buffer(t) for t in forward_outputs(*a)))

    def backward_in_buffers(*arguments):
        inputs, weights, *others = backward_outputs(*arguments)
        lists = [[inside_a_buffer(t) for t in some] for some in (inputs, weights)]
        return *lists, *(inside_a_buffer(t) for t in others)

    monkeypatch.setattr(op, "_backward_outputs", backward_in_buffers)
    for factors in ("mixed", "gated"):
        _run(make_call(5, 41, 3, factors, "layer", present=True))
    assert len(buffers) == 2 * 2 + 6 + 4 + 3 + 4
    for buffer, count in buffers:
        assert (buffer[:2048] == 7).all()
        assert (buffer[2048 + count :] == 7).all()


def test_parameter_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    call = make_call(5, 41, 2, "mixed", "layer")
    grads = [torch.randn(5, 41) for _ in range(2)]
    want = run_with_grads(fuse_modalities, call, grads)
    leaves = map_tensors(call, lambda t: t.detach().requires_grad_())
    outputs = fuse_modalities(**leaves)
    parameters = {n: t for n, t in tensors_of(leaves).items() if "weight" in n or "bias" in n}
    full = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = torch.empty(0)
        parameter.data = full[name]
    torch.autograd.backward(outputs, grads)
    for name, leaf in tensors_of(leaves).items():
        assert torch.equal(leaf.grad, want[f"grad_{name}"]), name


def _forward_arguments(call):
    names = ("gate_logits", "present", "attended", "residual")
    norm = (call.get("norm", "none"), call.get("norm_weight"), call.get("norm_bias"), call.get("eps", 1e-6))
    return call["inputs"], call.get("weights", []), *(call.get(name) for name in names), *norm


@pytest.mark.parametrize(("factors", "norm"), [("mixed", "layer"), ("gated", None)])
def test_opcheck(factors, norm) -> None:
    call = make_call(5, 24, 2, factors, norm, present=True)
    leaves = map_tensors(
        call, lambda t: t.t().contiguous().t().requires_grad_() if t.dim() == 2 else t.requires_grad_()
    )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks = checks if factors == "mixed" else checks[:3]  # the last one takes seconds
    torch.library.opcheck(op.fuse_modalities_forward, _forward_arguments(leaves), test_utils=checks)


def test_opcheck_of_the_backward() -> None:
    call = make_call(5, 24, 2, "mixed", "layer")
    mix = (call["inputs"], call["weights"], None, None, None)
    norm = ("layer", call["norm_weight"], call["norm_bias"], 1e-5)
    rows = (torch.randn(5, 24), torch.randn(5, 24), call["residual"])
    torch.library.opcheck(op.fuse_modalities_backward, (*rows, *mix, *norm, 3, True, False, True, True))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def block(**call):
        out, new_residual = fuse_modalities(**call)
        return out * 2, new_residual

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        call = make_call(length, 24, 2, "mixed", "rms")
        grads = [torch.randn(length, 24) for _ in range(2)]
        want, got = (run_with_grads(function, call, grads) for function in (block, compiled))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, HALF])
def test_autocast_computes_in_float32(autocast_dtype) -> None:
    call = make_call(5, 41, 2, "channel", "rms")
    call["attended"] = call["attended"].half()
    with torch.autocast("cpu", dtype=autocast_dtype):
        out, new_residual = fuse_modalities(**call)
    assert out.dtype == new_residual.dtype == FLOAT
    want, _ = fuse_modalities(**map_tensors(call, torch.Tensor.float))
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([torch.zeros(2, 8193)], ["8192", "8193", "TRICHORD_KERNELS=reference"]),
        ([torch.zeros(2, 8).double()], ["float32, bfloat16 and float16", "float64"]),
        ([torch.zeros(2, 0)], ["1 to 8192", "got 0"]),
        ([torch.zeros(2, 8), torch.zeros(2, 8, device="meta")], ["one device", "cpu", "meta"]),
    ],
)
def test_refuses_what_it_does_not_cover(inputs, words) -> None:
    with pytest.raises(ValueError) as caught:
        fuse_modalities(inputs)
    assert all(word in str(caught.value) for word in words), caught.value
