"""The plain-torch contrastive loss: the dense formulas' numbers, exact gradients, bounded memory, clear refusals."""

from __future__ import annotations

import pytest
import torch
from contrastive_loss_rule import FEATURES, MODES, dense_loss, messy_slots, operands, run

from trichord_kernels.bench.contrastive_loss import Shape, make_run
from trichord_kernels.bench.memory import peak_mib
from trichord_kernels.reference import contrastive_blocks, contrastive_loss


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    """So that a few rows are several blocks."""
    torch.manual_seed(0)
    monkeypatch.setattr(contrastive_blocks, "BLOCK_LOGITS", 64)
    monkeypatch.setattr(contrastive_blocks, "LEAST_BLOCK_ROWS", 3)


def _wide(num_queries: int, num_targets: int) -> dict[str, torch.Tensor]:
    return {name: t.double() for name, t in operands(num_queries, num_targets, 5, torch.float32).items()}


@pytest.mark.parametrize("is_messy", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(11, 14), (1, 1), (13, 2)], ids=str)
def test_equals_the_dense_formulas(shape, mode, is_messy) -> None:
    num_queries, num_targets = shape
    tensors = _wide(num_queries, num_queries if mode == "symmetric" else num_targets)
    slots = messy_slots(tensors, groups=4) if is_messy else {}
    want = run(dense_loss, tensors, **MODES[mode], **slots)
    got = run(contrastive_loss, tensors, **MODES[mode], **slots)
    for side in ("query", "target") if is_messy else ():
        name = f"grad_{'queries' if side == 'query' else 'targets'}"
        want[name][~slots[f"{side}_valid"]] = 0  # the dense one hands NaN on from unused slots
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_returned_gradients_are_those_of_autograd(mode) -> None:
    tensors = _wide(11, 11)
    slots = messy_slots(tensors, groups=4)
    want = run(contrastive_loss, tensors, **MODES[mode], **slots)
    loss, grads = contrastive_loss(*tensors.values(), **MODES[mode], **slots, return_gradients=True)
    torch.testing.assert_close(loss, want["loss"], rtol=1e-12, atol=0)
    for name in FEATURES:
        torch.testing.assert_close(1.7 * getattr(grads, name), want[f"grad_{name}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_exact(mode) -> None:
    tensors = [tensor.requires_grad_() for tensor in _wide(5, 5).values()]
    groups = {"query_groups": torch.tensor([0, 1, 1, 2, 3]), "target_groups": torch.tensor([1, 1, 0, 2, 9])}
    assert torch.autograd.gradcheck(lambda *args: contrastive_loss(*args, **MODES[mode], **groups), tensors)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_all_logits_costs_no_digits_of_the_gradient(offset) -> None:
    """Softmax ignores it; sums of exponentials that are not taken relative to the maximum overflow or vanish."""
    tensors = operands(40, 40, 8, torch.float32)
    tensors["queries"][:, 0], tensors["targets"][:, 0] = 0.0, 0.0
    want = run(contrastive_loss, tensors, **MODES["symmetric"])
    shifted = {name: tensor.clone() for name, tensor in tensors.items()}
    shifted["queries"][:, 0], shifted["targets"][:, 0] = 64.0, offset / 64 / 3
    got = run(contrastive_loss, shifted, **MODES["symmetric"])
    # A logit of 1e4 is rounded by 5e-4.
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-3, atol=0)
    torch.testing.assert_close(got["grad_queries"][:, 1:], want["grad_queries"][:, 1:], rtol=0, atol=5e-3)


def test_frozen_targets_get_no_gradient() -> None:
    tensors = _wide(6, 6)
    queries = tensors["queries"].requires_grad_()
    contrastive_loss(queries, tensors["targets"], tensors["logit_scale"]).backward()
    want = run(contrastive_loss, {**tensors, "queries": queries.detach()}, **MODES["symmetric"])
    torch.testing.assert_close(1.7 * queries.grad, want["grad_queries"])
    assert tensors["targets"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype) -> None:
    tensors = operands(9, 9, 8, dtype)
    got = run(contrastive_loss, tensors, **MODES["symmetric"])
    want = run(contrastive_loss, {name: t.float() for name, t in tensors.items()}, **MODES["symmetric"])
    assert got["loss"].dtype == torch.float32
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=0)
    assert torch.equal(got["grad_queries"], want["grad_queries"].to(dtype))


def test_memory_is_bounded_by_a_block() -> None:
    """At 4096 rows a dense float32 matrix of logits is 64 MiB, and the dense loss holds several."""
    ours, dense = (peak_mib(make_run, name, Shape(4096, 64)) for name in ("ours", "dense"))
    assert ours < dense / 2, f"{ours} MiB, dense {dense} MiB"


ROWS = torch.zeros(3, 4)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "clip"}, ["infonce or sigmoid", "'clip'"]),
        ({"targets": torch.zeros(3, 5)}, ["same E", "(3, 4) and (3, 5)"]),
        ({"queries": torch.zeros(4)}, ["(R, E)", "(4,)"]),
        ({"queries": torch.zeros(3, 0), "targets": torch.zeros(3, 0)}, ["at least 1", "(3, 0)"]),
        ({"targets": ROWS.half()}, ["one floating dtype", "float32", "float16", "cast"]),
        ({"queries": ROWS.long(), "targets": ROWS.long()}, ["floating", "int64"]),
        ({"targets": torch.zeros(2, 4)}, ["3 queries and 2 targets", "symmetric=False"]),
        ({"logit_scale": torch.ones(2)}, ["logit_scale", "() or (1,)", "(2,)"]),
        ({"logit_bias": torch.ones(1, 1)}, ["logit_bias", "(1, 1)"]),
        ({"query_groups": torch.zeros(3).long()}, ["both sides", "query_groups only"]),
        ({"query_groups": torch.zeros(3), "target_groups": torch.zeros(3)}, ["query_groups", "int64", "float32"]),
        ({"query_valid": torch.ones(2).bool()}, ["query_valid", "(3,)", "(2,)"]),
        ({"target_valid": torch.ones(3)}, ["target_valid", "bool", "float32"]),
    ],
)
def test_refuses_operands_that_do_not_fit(change, words) -> None:
    with pytest.raises(ValueError, match="contrastive_loss: expected") as caught:
        contrastive_loss(**({"queries": ROWS, "targets": ROWS, "logit_scale": ONE} | change))
    assert all(word in str(caught.value) for word in words), caught.value
