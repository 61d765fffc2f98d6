"""The plain-torch RMSNorm: the public model's numbers, exact gradients, clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trichord_kernels.reference import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_llama_bit_for_bit(dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(3, 5, 96).to(dtype), torch.randn(3, 5, 96).to(dtype)
    out, new_residual = rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))
    assert torch.equal(out, norm(x + residual))
    assert torch.equal(new_residual, x + residual)


def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: rms_norm(args[0], args[1], 1e-6, args[2]), (x, weight, residual))


def test_result_has_the_dtype_of_x_whatever_the_weight() -> None:
    out = rms_norm(torch.randn(2, 8).bfloat16(), torch.ones(8))
    assert out.dtype == torch.bfloat16


def test_autocast_computes_in_float32() -> None:
    x, weight, residual = torch.randn(2, 8).bfloat16(), torch.randn(8), torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, new_residual = rms_norm(x, weight, 1e-6, residual)
    want, _ = rms_norm(x.float(), weight, 1e-6, residual)
    assert out.dtype == new_residual.dtype == torch.float32
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "words"),
    [
        (torch.zeros(2, 8), torch.zeros(7), None, ["(7,)", "(2, 8)", "weight"]),
        (torch.zeros(2, 8), torch.zeros(1, 8), None, ["(1, 8)", "1-D"]),
        (torch.zeros(()), torch.zeros(1), None, ["()"]),
        (torch.zeros(2, 8), torch.zeros(8).half(), None, ["float32", "float16", "cast"]),
        (torch.zeros(2, 8), torch.zeros(8), torch.zeros(8), ["residual", "(2, 8)", "(8,)"]),
        (torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 8).half(), ["residual", "float16"]),
    ],
)
def test_refuses_operands_that_do_not_fit(x, weight, residual, words) -> None:
    with pytest.raises(ValueError, match="rms_norm: expected") as caught:
        rms_norm(x, weight, residual=residual)
    assert all(word in str(caught.value) for word in words), caught.value
