"""Calls of fuse_modalities to judge, and how to run one with every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_rule import ErrorRatio, judge, sum_floor
from torch import Tensor

from trichord_kernels import reference

Call = dict[str, Any]


def make_call(
    num_rows: int,
    width: int,
    num_inputs: int,
    factors: str = "channel",
    norm: str | None = "rms",
    *,
    attended: bool = True,
    residual: bool = True,
    present: bool = False,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Call:
    """Keyword arguments of one call. factors: none, scalar, channel, mixed or gated. One row has nothing present."""

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weight_dtype = weight_dtype or dtype
    call: Call = {"inputs": [random(num_rows, width) for _ in range(num_inputs)]}
    if factors == "gated":
        call["gate_logits"] = random(num_rows, num_inputs, dtype=weight_dtype)
    elif factors != "none":
        is_channel = [factors == "channel" or (factors == "mixed" and i % 2 == 0) for i in range(num_inputs)]
        call["weights"] = [random(width if channel else 1, dtype=weight_dtype) for channel in is_channel]
    if present:
        call["present"] = torch.rand(num_rows, num_inputs, device=device) > 0.4
        call["present"][num_rows // 2] = False
    if attended:
        call["attended"] = random(num_rows, width)
    if residual:
        call["residual"] = random(num_rows, width)
    if norm:
        call |= {"norm": norm, "eps": 1e-5, "norm_weight": random(width, dtype=weight_dtype)}
    if norm == "layer":
        call["norm_bias"] = random(width, dtype=weight_dtype)
    return call


def tensors_of(call: Call) -> dict[str, Tensor]:
    """The call's tensors by name; those of a list by name and number."""
    named: dict[str, Tensor] = {}
    for name, value in call.items():
        if isinstance(value, list):
            named |= {f"{name}{i}": t for i, t in enumerate(value)}
        elif isinstance(value, Tensor):
            named[name] = value
    return named


def map_tensors(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with every floating-point tensor changed."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in call.items()}


def run_with_grads(function: Callable, call: Call, grads: list[Tensor]) -> dict[str, Tensor]:
    """Every output and every gradient by name. Inputs and incoming gradients must come back unchanged."""
    leaves = map_tensors(call, lambda t: t.detach().requires_grad_())
    watched = [*tensors_of(call).values(), *grads]
    before = [t.clone() for t in watched]
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    torch.autograd.backward(outputs, grads[: len(outputs)])
    same = [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, watched)]
    assert all(same), "an input or incoming gradient was changed"
    named = dict(zip(("out", "new_residual"), (t.detach() for t in outputs)))
    for name, leaf in tensors_of(leaves).items():
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"no gradient of {name}"
            named[f"grad_{name}"] = leaf.grad
    return named


def judge_call(function: Callable, call: Call, grads: list[Tensor]) -> tuple[dict[str, Tensor], list[ErrorRatio]]:
    """The error rule against float64, and the same bits in a second run."""
    wide_call, wide_grads = map_tensors(call, torch.Tensor.double), [grad.double() for grad in grads]
    ours = run_with_grads(function, call, grads)
    plain = run_with_grads(reference.fuse_modalities, call, grads)
    exact = run_with_grads(reference.fuse_modalities, wide_call, wide_grads)
    ratios = judge(ours, plain, exact, _sum_floors(wide_call, wide_grads, exact))
    again = run_with_grads(function, call, grads)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the second run gave other bits"
    return ours, ratios


def _sum_floors(call: Call, grads: list[Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """What rounding and order of the long sums' terms may cost: of weights, the norm's weight and bias, gates."""
    floors, grad_z = {}, grads[0].abs()
    if call.get("norm"):
        h = exact["new_residual"] if "residual" in call else reference.fuse_modalities(**_without_norm(call))
        one = torch.ones_like(call["norm_weight"])
        normed = reference.fuse_modalities([h], norm=call["norm"], norm_weight=one, eps=call["eps"])
        floors = {"grad_norm_weight": sum_floor(grads[0] * normed), "grad_norm_bias": sum_floor(grads[0])}
        grad_z = _grad_z_size(call, h, normed, grads[0] * call["norm_weight"])
    if "residual" in call:
        grad_z = grad_z + grads[1].abs()
    for i, x in enumerate(call["inputs"]):
        terms = grad_z * torch.nan_to_num(x)
        if "weights" in call:
            is_scalar = call["weights"][i].shape[0] == 1
            floors[f"grad_weights{i}"] = sum_floor(terms.reshape(-1, 1) if is_scalar else terms)
        elif "gate_logits" in call:
            floors["grad_gate_logits"] = max(floors.get("grad_gate_logits", 0.0), sum_floor(terms.t()))
    return floors


def _grad_z_size(call: Call, h: Tensor, normed: Tensor, g: Tensor) -> Tensor:
    """The sizes of d_z's terms added up, rstd * (g - n * mean(g * n) - mean(g)): they cancel; their rounding stays."""
    centred = h - h.mean(1, keepdim=True) if call["norm"] == "layer" else h
    rstd = (centred.square().mean(1, keepdim=True) + call["eps"]).rsqrt()
    mean = g.mean(1, keepdim=True).abs() if call["norm"] == "layer" else 0.0
    return rstd * (g.abs() + normed.abs() * (g * normed).mean(1, keepdim=True).abs() + mean)


def _without_norm(call: Call) -> Call:
    return {name: value for name, value in call.items() if not name.startswith("norm") and name != "eps"}
