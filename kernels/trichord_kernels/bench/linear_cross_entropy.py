"""Linear + cross-entropy, forward and backward, 40 % of the rows labelled, against `F.cross_entropy(F.linear(x))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import linear_cross_entropy
from trichord_kernels.bench.memory import gpu_peak_mib, peak_mib
from trichord_kernels.bench.timing import bench_row, median_ms

LABELLED_SHARE = 0.4
_CPU_TURNS = 3  # a run takes seconds: more turns than that tell nothing new


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    hidden_size: int
    vocab_size: int


GPU_SHAPE = Shape(8192, 4096, 151936)
CPU_SHAPE = Shape(8192, 512, 32768)
QUICK_SHAPE = Shape(512, 64, 4096)  # fewer than 5 repeats: a look whether it runs


def rows(device: torch.device, repeats: int) -> list[dict]:
    if device.type == "cuda":
        return _gpu_rows(device, repeats)
    shape = CPU_SHAPE if repeats >= 5 else QUICK_SHAPE
    hidden, weight, labels = inputs(shape, "cpu")
    times = median_ms(
        lambda: run_ours(hidden, weight, labels), lambda: run_plain(hidden, weight, labels), device, _CPU_TURNS
    )
    ours_mib, plain_mib = (peak_mib(make_run, name, shape) for name in ("ours", "plain"))
    return [_row(hidden, weight, times, labels) | {"peak_mib": ours_mib, "torch_peak_mib": plain_mib}]


def _gpu_rows(device: torch.device, repeats: int) -> list[dict]:
    """Ours with the number of labels known to the host, against the plain form and torch's own chunked one."""
    hidden, weight, labels = inputs(GPU_SHAPE, device)
    num_labelled = int((labels != -100).sum())

    def ours() -> None:
        run_ours(hidden, weight, labels, num_labelled)

    found = []
    for name, plain in _contestants(hidden, weight, labels).items():
        row = _row(hidden, weight, median_ms(ours, plain, device, repeats), labels)
        peaks = {"peak_mib": gpu_peak_mib(ours, device), "torch_peak_mib": gpu_peak_mib(plain, device)}
        found.append(row | peaks | {"against": name})
    return found


def _contestants(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"F.cross_entropy(F.linear)": lambda: run_plain(hidden, weight, labels)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = lambda: _backward(
            F.linear_cross_entropy(  # pyright: ignore[reportAttributeAccessIssue]  only newer torch has it
                hidden, weight, labels, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
            ),
            hidden,
            weight,
        )
    try:
        liger = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError:
        return found
    found["Liger"] = lambda: _backward(
        liger.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0],
        hidden,
        weight,
    )
    return found


def _row(hidden: Tensor, weight: Tensor, times: tuple[float, float], labels: Tensor) -> dict:
    """Least bytes: hidden, weight and their gradients once. FLOPs: what the labelled rows need, 6 per logit and D."""
    row = bench_row("linear_cross_entropy_fwd_bwd", hidden, times, num_bytes=2 * (hidden.nbytes + weight.nbytes))
    num_labelled = int((labels != -100).sum())
    tera = 6 * num_labelled * weight.numel() / 1e12
    row["shape"] = [*hidden.shape, weight.shape[0]]
    return row | {"labelled": num_labelled, "tflop_per_s": round(tera / times[0] * 1e3, 4)}


def inputs(shape: Shape, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, D) and weight (V, D) that need gradients, labels (T,) with 40 % of them set."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    hidden = normal(shape.num_tokens, shape.hidden_size)
    weight = normal(shape.vocab_size, shape.hidden_size) / shape.hidden_size**0.5
    labels = torch.randint(0, shape.vocab_size, (shape.num_tokens,), generator=generator, device=device)
    dropped = torch.rand(shape.num_tokens, generator=generator, device=device) > LABELLED_SHARE
    return hidden.requires_grad_(), weight.requires_grad_(), labels.masked_fill_(dropped, -100)


def run_ours(hidden: Tensor, weight: Tensor, labels: Tensor, num_labelled: int | None = None) -> None:
    _backward(linear_cross_entropy(hidden, weight, labels, num_labelled=num_labelled), hidden, weight)


def run_plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    _backward(F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum"), hidden, weight)


def _backward(loss: Tensor, hidden: Tensor, weight: Tensor) -> None:
    torch.autograd.grad(loss, (hidden, weight))


def make_run(name: str, shape: Shape) -> Callable[[], object]:
    """For `peak_mib`: the inputs, and one run that libraries have seen a small version of."""
    run = {"ours": run_ours, "plain": run_plain}[name]
    run(*inputs(Shape(16, 16, 64), "cpu"))
    tensors = inputs(shape, "cpu")
    return lambda: run(*tensors)
