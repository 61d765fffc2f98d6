"""The rule kernels are judged by, and tensors in awkward layouts to judge them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "row_strided", "odd_row_stride", "expanded_rows", "unaligned")


def in_layout(values: Tensor, layout: str) -> Tensor:
    """`values` (rows, D) in that memory layout with NaN around them; `expanded_rows` is row 0 repeated."""
    rows, width = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "expanded_rows":
        return values[:1].expand(rows, width)
    stride, offset = {
        "contiguous": (width, 64),
        "row_strided": (-(-width // 8) * 8 + 16, 64),
        "odd_row_stride": (width + 3, 64),
        "unaligned": (width, 65),
    }[layout]
    buffer = values.new_full((offset + rows * stride + 64,), float("nan"))
    view = buffer.as_strided((rows, width), (stride, 1), offset)
    return view.copy_(values)


@dataclass(frozen=True)
class ErrorRatio:
    """Largest errors against float64 of ours and of the torch path, and the rounding floor of the result."""

    name: str
    ours: float
    torch: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.ours / max(self.torch, self.floor, 1e-30)


def judge(
    ours: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    sum_floors: dict[str, float] | None = None,
    factor: float = 2.0,
) -> list[ErrorRatio]:
    """Assert error <= factor x the torch path's error + the floor for every named result; returns the figures.

    The floor is what rounding the exact result to its dtype twice costs; for a result that is a long float32 sum,
    `sum_floors` gives the cost of adding it up in another order, where that is more.
    """
    ratios = []
    for name, want in exact.items():
        got, same = ours[name], plain[name]
        assert got.dtype == same.dtype, f"{name}: dtype {got.dtype}, the torch path gives {same.dtype}"
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        rounded = want.to(got.dtype)
        floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item() if want.numel() else 0.0
        floor = max(floor, (sum_floors or {}).get(name, 0.0))
        found = ErrorRatio(name, _max_error(got, want), _max_error(same, want), floor)
        assert found.ours <= factor * found.torch + found.floor, f"{found}"
        ratios.append(found)
    return ratios


def sum_floor(terms: Tensor) -> float:
    """What the order of a float32 sum over axis 0 may cost: eps * sum |terms|, the worst-case bound for 3 terms."""
    return torch.finfo(torch.float32).eps * terms.abs().sum(dim=0).max().item() if terms.numel() else 0.0


def _max_error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item() if want.numel() else 0.0


def run_with_grads(
    function: Callable, inputs: dict[str, Tensor | None], eps: float, grads: tuple[Tensor, Tensor | None]
) -> dict[str, Tensor]:
    """Forward and backward of an rms_norm: every output and every gradient by name. Inputs must come back unchanged."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    before = [t.clone() for t in (*inputs.values(), *grads) if t is not None]
    result = function(leaves["x"], leaves["weight"], eps, leaves["residual"])
    outputs = (result,) if leaves["residual"] is None else result
    torch.autograd.backward(outputs, grads[: len(outputs)])
    after = [t for t in (*inputs.values(), *grads) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after)), "an input or incoming gradient was changed"
    named = dict(zip(("out", "new_residual"), (t.detach() for t in outputs)))
    return named | {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
