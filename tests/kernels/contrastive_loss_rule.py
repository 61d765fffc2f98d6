"""What tests of the contrastive loss share: a dense loss straight from the formulas, operands, and the judgement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kernel_rule import ErrorRatio, judge, sum_floor
from torch import Tensor

from trichord_kernels import reference

FEATURES = ("queries", "targets", "logit_scale", "logit_bias")
MODES = {
    "symmetric": {"kind": "infonce", "symmetric": True},
    "one_way": {"kind": "infonce", "symmetric": False},
    "sigmoid": {"kind": "sigmoid", "symmetric": True},
}


def dense_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    kind: str,
    symmetric: bool,
    query_groups: Tensor | None = None,
    target_groups: Tensor | None = None,
    query_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
) -> Tensor:
    """The loss from all logits at once, valid slots picked out first."""
    query_ids = torch.arange(len(queries), device=queries.device) if query_groups is None else query_groups
    target_ids = torch.arange(len(targets), device=queries.device) if target_groups is None else target_groups
    if query_valid is not None:
        queries, query_ids = queries[query_valid], query_ids[query_valid]
    if target_valid is not None:
        targets, target_ids = targets[target_valid], target_ids[target_valid]
    positive = query_ids[:, None] == target_ids
    logits = logit_scale * queries @ targets.T
    if kind == "sigmoid":
        return -F.logsigmoid((logits + logit_bias) * torch.where(positive, 1, -1)).sum()
    losses = _rows_loss(logits, positive)
    return 0.5 * (losses + _rows_loss(logits.T, positive.T)) if symmetric else losses


def _rows_loss(logits: Tensor, positive: Tensor) -> Tensor:
    if not logits.numel():
        return logits.sum()
    per_row = -(logits.log_softmax(dim=1) * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return per_row.sum()


def operands(
    num_queries: int, num_targets: int, size: int, dtype: torch.dtype, scale: float = 3.0, bias: float = -1.0
) -> dict[str, Tensor]:
    """Features of length about 1 and the scalars, the scale of shape (1,), the bias of shape ()."""
    queries, targets = (F.normalize(torch.randn(n, size), dim=1) for n in (num_queries, num_targets))
    return dict(zip(FEATURES, (queries.to(dtype), targets.to(dtype), torch.tensor([scale]), torch.tensor(bias))))


def messy_slots(tensors: dict[str, Tensor], groups: int = 9) -> dict[str, Tensor]:
    """Groups with several positives, rows with none, a third of the slots not valid, with NaN in their features."""
    num_queries, num_targets = len(tensors["queries"]), len(tensors["targets"])
    slots = {
        "query_groups": torch.randint(-groups, groups, (num_queries,)) * 2**40,
        "target_groups": torch.randint(-groups, 0, (num_targets,)) * 2**40,
        "query_valid": torch.rand(num_queries) > 0.3,
        "target_valid": torch.rand(num_targets) > 0.3,
    }
    tensors["queries"][~slots["query_valid"]] = torch.nan
    tensors["targets"][~slots["target_valid"]] = torch.nan
    return slots


def run(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Loss and every gradient by name, for an incoming gradient of 1.7. Inputs must come back unchanged."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    before = [tensor.clone() for tensor in tensors.values()]
    loss = function(*leaves.values(), **options)
    (1.7 * loss).backward()
    for old, new in zip(before, tensors.values()):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"loss": loss.detach()} | {f"grad_{name}": grad for name, grad in grads.items()}


def judge_loss(ours: dict[str, Tensor], tensors: dict[str, Tensor], **options: Any) -> list[ErrorRatio]:
    """Against the plain-torch twin in the same precision, both against the dense loss in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    exact = run(dense_loss, wide, **options)
    for name, valid in (("queries", options.get("query_valid")), ("targets", options.get("target_valid"))):
        if valid is not None:
            exact[f"grad_{name}"][~valid] = 0.0
    return judge(ours, run(reference.contrastive_loss, tensors, **options), exact, floors(wide, **options))


def floors(wide: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """What another order of adding costs the sums over all pairs, where their terms are larger than the result."""
    slots = [options.get(name) for name in ("query_valid", "target_valid")]
    queries, targets = (
        features if valid is None else torch.where(valid[:, None], features, 0)
        for features, valid in zip((wide["queries"], wide["targets"]), slots)
    )
    products = queries @ targets.T
    leaf = (wide["logit_scale"] * products).requires_grad_()
    # The gradient by each logit: the dense loss of features whose products are these logits.
    eye = torch.eye(len(targets), dtype=torch.float64, device=leaf.device)
    loss = dense_loss(leaf, eye, torch.ones((), device=leaf.device), wide["logit_bias"], **options)
    loss.backward()
    terms = 1.7 * leaf.grad.flatten()
    return {
        "loss": sum_floor(loss.detach().reshape(1)),  # no row's loss is negative
        "grad_logit_scale": sum_floor(terms * products.flatten()),
        "grad_logit_bias": sum_floor(terms),
    }
