"""The contrastive loss over ranks: losses and gradients equal those of one process that holds everything."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from trichord_kernels import contrastive_loss

pytestmark = pytest.mark.distributed

ROWS = 24  # of the whole batch
SIZE = 12
WEIGHTS = (1.7, -0.6, 0.0, 2.5)  # what the ranks multiply their losses by
CASES = [
    ("infonce", True, "plain"),
    ("infonce", True, "messy"),
    ("infonce", False, "messy"),
    ("infonce", False, "uneven"),
    ("sigmoid", True, "plain"),
    ("sigmoid", True, "messy"),
    ("sigmoid", False, "uneven"),
]


def batch(layout: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Features of the whole batch and what is known of its slots.

    messy: groups with several positives over all ranks, rows with none, NaN where not valid, the first quarter of the
    queries (with 4 ranks all of rank 0's) not valid; uneven: the same with twice as many targets as queries.
    """
    generator = torch.Generator().manual_seed(7)
    num_targets = 2 * ROWS if layout == "uneven" else ROWS
    features = {
        name: torch.randn(n, SIZE, dtype=torch.float64, generator=generator) / SIZE**0.5
        for name, n in (("queries", ROWS), ("targets", num_targets))
    }
    if layout == "plain":
        return features, {}
    slots = {
        "query_groups": torch.randint(-4, 4, (ROWS,), generator=generator),
        "target_groups": torch.randint(-4, 2, (num_targets,), generator=generator),
        "query_valid": torch.rand(ROWS, generator=generator) > 0.3,
        "target_valid": torch.rand(num_targets, generator=generator) > 0.3,
    }
    slots["query_valid"][: ROWS // 4] = False
    for side in ("query", "target"):
        features["queries" if side == "query" else "targets"][~slots[f"{side}_valid"]] = torch.nan
    return features, slots


def scalars() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([3.0], dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)


def own_losses(cases: list) -> list[dict[str, torch.Tensor]]:
    """On every rank: its losses and gradients, by autograd (weighted) and as returned, for every case."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for kind, symmetric, layout in cases:
        features, slots = batch(layout)

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.chunk(world_size)[rank].clone()

        leaves = [part(tensor).requires_grad_() for tensor in features.values()]
        leaves += [scalar.requires_grad_() for scalar in scalars()]
        options = {"kind": kind, "symmetric": symmetric, "group": dist.group.WORLD}
        options |= {name: part(tensor) for name, tensor in slots.items()}
        loss = contrastive_loss(*leaves, **options)
        (loss * WEIGHTS[rank]).backward()
        whole, gradients = contrastive_loss(*leaves, **options, return_gradients=True)
        assert torch.equal(whole, loss.detach())
        names = ("queries", "targets", "logit_scale", "logit_bias")
        result = {"loss": whole} | {f"returned_{name}": getattr(gradients, name) for name in names}
        for name, leaf in zip(names, leaves):
            result[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found.append({name: tensor.numpy() for name, tensor in result.items()})
    return found


def one_process(kind: str, symmetric: bool, layout: str, world_size: int) -> dict[str, torch.Tensor]:
    """The same from the whole batch, with all logits at once."""
    features, slots = batch(layout)
    leaves = [torch.nan_to_num(tensor).requires_grad_() for tensor in features.values()]
    leaves += [scalar.requires_grad_() for scalar in scalars()]
    losses = _losses_by_rank(*leaves, kind, symmetric, slots, world_size)
    names = ("queries", "targets", "logit_scale", "logit_bias")
    result = {"loss": torch.stack(losses).detach()}
    for prefix, weights in (("", WEIGHTS), ("returned_", (1.0,) * 4)):
        total = sum(weight * loss for weight, loss in zip(weights, losses))
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        for name, leaf, grad in zip(names, leaves, grads):
            result[prefix + name] = torch.zeros_like(leaf) if grad is None else grad
    return result


def _losses_by_rank(queries, targets, scale, bias, kind, symmetric, slots, world_size) -> list[torch.Tensor]:
    """Dense, from the formulas."""
    everyone = torch.arange(len(queries)), torch.arange(len(targets))
    query_groups, target_groups = (slots.get(f"{s}_groups", ids) for s, ids in zip(("query", "target"), everyone))
    query_valid, target_valid = (slots.get(f"{s}_valid", ids >= 0) for s, ids in zip(("query", "target"), everyone))
    positive = (query_groups[:, None] == target_groups) & query_valid[:, None] & target_valid
    logits = scale * queries @ targets.T
    if kind == "sigmoid":
        used = query_valid[:, None] & target_valid
        per_pair = -torch.nn.functional.logsigmoid((logits + bias) * torch.where(positive, 1, -1)) * used
        return [rows.sum() for rows in per_pair.chunk(world_size)]
    losses = [rows.sum() for rows in _infonce(logits, positive, target_valid).chunk(world_size)]
    if symmetric:
        columns = [rows.sum() for rows in _infonce(logits.T, positive.T, query_valid).chunk(world_size)]
        losses = [0.5 * (row + column) for row, column in zip(losses, columns)]
    return losses


def _infonce(logits: torch.Tensor, positive: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    log_prob = logits.masked_fill(~valid, -1e300).log_softmax(dim=1)
    return -(log_prob * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_split_equals_one_process(world_size):
    by_rank = run_ranks(world_size, own_losses, CASES)
    for number, case in enumerate(CASES):
        want = one_process(*case, world_size)
        got = [{name: torch.from_numpy(array) for name, array in rank[number].items()} for rank in by_rank]
        whole = {"loss": torch.stack([rank["loss"] for rank in got])}
        for name in ("queries", "targets", "returned_queries", "returned_targets"):
            whole[name] = torch.cat([rank[name] for rank in got])
        for name in ("logit_scale", "logit_bias"):  # a share on each rank
            whole[name] = torch.stack([rank[name] for rank in got]).sum(dim=0)
        for rank in got:  # returned scalars are whole on every rank
            for name in ("returned_logit_scale", "returned_logit_bias"):
                torch.testing.assert_close(rank[name], want[name], rtol=1e-10, atol=1e-12, msg=f"{case}, {name}")
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-10, atol=1e-12, msg=f"{case}, {name}")
