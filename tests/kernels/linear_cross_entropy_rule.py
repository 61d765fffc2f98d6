"""linear_cross_entropy against torch's own cross_entropy, by the rule of `kernel_rule`, for all its test files."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_rule import ErrorRatio, judge
from torch import Tensor

from trichord_kernels import linear_cross_entropy

OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0},
}


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    num_labelled: int | None = None,
) -> Tensor:
    """The definition by torch's functions and autograd, with all logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits, labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    labelled = labels != ignore_index
    losses = torch.where(labelled, losses + z_loss * logits.logsumexp(1).square(), 0.0)
    weights = labelled if token_weights is None else torch.where(labelled, token_weights, 0.0)
    losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def operands(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """hidden, weight and bias whose logits have a spread of about 2, and labels of which about 40 % are -100."""
    tensors = {
        "hidden": torch.randn(num_tokens, hidden_size, device=device).to(dtype),
        "weight": (2 * torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5).to(dtype),
        "bias": torch.randn(vocab_size, device=device).to(dtype),
    }
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)
    return tensors, labels.masked_fill(torch.rand(num_tokens, device=device) < 0.4, -100)


def run_with_grads(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], labels: Tensor, grad: Tensor, options: dict
) -> dict[str, Tensor]:
    """The loss and every gradient by name. Inputs and the incoming gradient must come back unchanged."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    before = [t.clone() for t in (*tensors.values(), labels, grad)]
    loss = function(labels=labels, **leaves, **options)
    loss.backward(grad.to(loss.dtype))
    after = (*tensors.values(), labels, grad)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after)), "an input was changed"
    found = {name: leaf.grad for name, leaf in leaves.items()}
    return {"loss": loss.detach()} | {f"grad_{name}": grad for name, grad in found.items() if grad is not None}


def judge_loss(
    tensors: dict[str, Tensor],
    labels: Tensor,
    options: dict,
    grad: Tensor | None = None,
    record_property: Callable | None = None,
) -> dict[str, Tensor]:
    """Hold the loss and all gradients to the rule, the second run to the same bits. `grad`: incoming, (T,) or ()."""
    options = {"reduction": "sum", **options}
    if grad is None:
        scalar = options["reduction"] != "none"
        grad = torch.randn(() if scalar else labels.shape, device=labels.device)
    wide = {name: t.double() for name, t in tensors.items()}
    ours = run_with_grads(linear_cross_entropy, tensors, labels, grad, options)
    same = run_with_grads(plain, tensors, labels, grad, options)
    exact = run_with_grads(plain, wide, labels, grad, options)
    ratios: list[ErrorRatio] = judge(ours, same, exact, _sum_floors(wide, labels, options, grad, exact))
    if record_property is not None:
        record_property("worst_error_ratio", max(ratio.ratio for ratio in ratios))
    again = run_with_grads(linear_cross_entropy, tensors, labels, grad, options)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the second run gave other bits"
    return ours


def _sum_floors(
    wide: dict[str, Tensor], labels: Tensor, options: dict, grad: Tensor, exact: dict[str, Tensor]
) -> dict[str, float]:
    """What the order of the float32 sums costs: over rows for the loss, d_weight and d_bias, over V for d_hidden."""
    eps = torch.finfo(torch.float32).eps
    logits = (wide["hidden"] @ wide["weight"].t() + wide.get("bias", 0.0)).detach().requires_grad_()
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    kept = {"token_weights": wide["token_weights"]} if "token_weights" in wide else {}
    plain(logits, identity, labels, **kept, **options).backward(grad.double())
    assert logits.grad is not None
    weights = (labels != options.get("ignore_index", -100)) * kept.get("token_weights", torch.ones_like(logits[:, 0]))
    share = grad.double().abs() / (weights.sum() if options.get("reduction") == "mean" else 1)
    incoming = share * weights
    d = logits.grad.abs()  # the label's own entry is a difference of two numbers about as large as what comes in
    d = d.scatter_add(1, labels.clamp(min=0)[:, None], incoming[:, None])
    rows = plain(**wide, labels=labels, **options | {"reduction": "none"})
    return {
        "grad_token_weights": 2 * eps * (rows.abs() * share).max().item(),
        "loss": eps * exact["loss"].abs().sum().item(),
        "grad_hidden": eps * (d @ wide["weight"].abs()).max().item(),
        "grad_weight": eps * (d.t() @ wide["hidden"].abs()).max().item(),
        "grad_bias": eps * d.sum(0).max().item(),
    }
