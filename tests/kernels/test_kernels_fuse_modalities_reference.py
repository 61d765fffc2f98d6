"""The plain-torch modality fusion: its formulas, exact gradients, clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import make_call, tensors_of

from trichord_kernels.reference import fuse_modalities, rms_norm

Z = torch.zeros


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("factors", ["scalar", "channel", "mixed"])
def test_weighted_attention(factors) -> None:
    """z = w1*x + w2*y + Att(x, y), the formula this op is named for."""
    call = make_call(5, 16, 2, factors, None, residual=False, dtype=torch.float64)
    (x, y), (w1, w2) = call["inputs"], call["weights"]
    torch.testing.assert_close(fuse_modalities(**call), w1 * x + w2 * y + call["attended"])


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_residual_and_norm(norm) -> None:
    call = make_call(5, 16, 2, "none", norm, dtype=torch.float64)
    out, h = fuse_modalities(**call)
    torch.testing.assert_close(h, call["residual"] + sum(call["inputs"]) + call["attended"])
    want = h
    if norm == "rms":
        want = rms_norm(h, call["norm_weight"], 1e-5)
    elif norm == "layer":
        want = F.layer_norm(h, (16,), call["norm_weight"], call["norm_bias"], 1e-5)
    assert torch.equal(out, want)


def test_gates_are_a_softmax_over_the_present() -> None:
    call = make_call(4, 16, 3, "gated", None, attended=False, residual=False, dtype=torch.float64)
    everything = torch.stack(call["inputs"], 1)
    gates = call["gate_logits"].softmax(1)
    torch.testing.assert_close(fuse_modalities(**call), (gates[..., None] * everything).sum(1))
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    out = fuse_modalities(**call, present=present)
    two = call["gate_logits"][1, ::2].softmax(0)
    torch.testing.assert_close(out[1], two[0] * everything[1, 0] + two[1] * everything[1, 2])
    assert torch.equal(out[2], everything[2, 1])
    assert not out[3].any()


@pytest.mark.parametrize(
    ("factors", "norm", "present"),
    [("mixed", "layer", False), ("gated", "rms", True), ("scalar", None, True), ("none", "layer", True)],
)
def test_gradients_are_exact(factors, norm, present) -> None:
    call = make_call(3, 4, 2, factors, norm, present=present, dtype=torch.float64)
    leaves = [t for t in tensors_of(call).values() if t.is_floating_point()]

    def function(*leaves):
        left = iter(leaves)

        def put(value):
            if isinstance(value, list):
                return [put(item) for item in value]
            return next(left) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return fuse_modalities(**{name: put(value) for name, value in call.items()})

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


def test_layer_norm_rounds_like_torch() -> None:
    x, weight, bias = torch.randn(9, 96).bfloat16(), torch.randn(96).bfloat16(), torch.randn(96).bfloat16()
    out = fuse_modalities([x], norm="layer", norm_weight=weight, norm_bias=bias, eps=1e-5)
    assert torch.equal(out, F.layer_norm(x, (96,), weight, bias, 1e-5))


def test_the_sum_is_rounded_once() -> None:
    x = torch.full((1, 4), 1.0).bfloat16()
    small = torch.full((1, 4), 2.0**-8).bfloat16()  # lost beside 1 in bfloat16, twice it is not
    assert (fuse_modalities([x, small, small]) == 1 + 2.0**-7).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"inputs": []}, ["1 to 8", "got 0"]),
        ({"inputs": [Z(2, 8)] * 9}, ["1 to 8", "got 9"]),
        ({"inputs": [Z(1, 2, 8)]}, ["(1, 2, 8)", "flatten"]),
        ({"inputs": [Z(2, 8), Z(2, 7)]}, ["inputs[1]", "(2, 8)", "(2, 7)"]),
        ({"inputs": [Z(2, 8), Z(2, 8).half()]}, ["inputs[1]", "float32", "float16"]),
        ({"attended": Z(3, 8)}, ["attended", "(3, 8)"]),
        ({"residual": Z(2, 8).double()}, ["residual", "float64"]),
        ({"weights": [Z(1)]}, ["one weight per input, 2, got 1"]),
        ({"weights": []}, ["one weight per input, 2, got 0"]),
        ({"weights": [Z(1), Z(())]}, ["weights[1]", "(1,) or (8,)", "()"]),
        ({"weights": [Z(1), Z(7)]}, ["weights[1]", "(7,)"]),
        ({"weights": [Z(1), Z(8).half()]}, ["weights[1]", "float16"]),
        ({"weights": [Z(1), Z(1)], "gate_logits": Z(2, 2)}, ["weights or gate_logits, got both"]),
        ({"gate_logits": Z(2, 3)}, ["(2, 2)", "(2, 3)"]),
        ({"gate_logits": Z(2, 2).half()}, ["gate_logits", "float16"]),
        ({"present": Z(2, 2)}, ["present (2, 2) in bool", "float32"]),
        ({"present": Z(2, 3).bool()}, ["(2, 3)"]),
        ({"norm": "batch", "norm_weight": Z(8)}, ["'rms' or 'layer'", "'batch'"]),
        ({"norm": "rms"}, ["norm_weight with a norm", "'rms'", "neither"]),
        ({"norm_weight": Z(8)}, ["got norm None with norm_weight"]),
        ({"norm": "rms", "norm_weight": Z(8), "norm_bias": Z(8)}, ["'layer' only", "norm_bias"]),
        ({"norm": "rms", "norm_weight": Z(7)}, ["norm_weight (8,)", "(7,)"]),
        ({"norm": "layer", "norm_weight": Z(8), "norm_bias": Z(8).half()}, ["norm_bias (8,)", "float16"]),
    ],
)
def test_refuses_operands_that_do_not_fit(call, words) -> None:
    with pytest.raises(ValueError, match="fuse_modalities: expected") as caught:
        fuse_modalities(**({"inputs": [Z(2, 8), Z(2, 8)]} | call))
    assert all(word in str(caught.value) for word in words), caught.value
