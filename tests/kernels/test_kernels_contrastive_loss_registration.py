"""The contrastive loss as torch sees it: custom ops, fakes, autograd, graphs, on the reference path."""

from __future__ import annotations

import pytest
import torch
from contrastive_loss_rule import MODES, operands
from torch._subclasses.fake_tensor import FakeTensorMode

from trichord_kernels import contrastive_loss
from trichord_kernels.errors import KernelError
from trichord_kernels.ops import contrastive_loss as op


@pytest.fixture(autouse=True)
def _on_the_reference_path(monkeypatch) -> None:
    monkeypatch.delenv("TRICHORD_KERNELS", raising=False)
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode) -> None:
    leaves = [tensor.requires_grad_() for tensor in operands(6, 6, 8, torch.float32).values()]
    ids = torch.tensor([0, 1, -1, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 1, 2, -2, 3, 5], dtype=torch.int32)
    arguments = (*leaves, *ids, *MODES[mode].values())
    torch.library.opcheck(op.contrastive_loss_forward, arguments)
    detached = [tensor.detach() for tensor in (*leaves, *ids)]
    loss, *stats = op.contrastive_loss_forward(*detached, *MODES[mode].values())
    for wanted in ((True, True), (False, True), (True, False)):
        backward = (loss, *detached, *stats, *MODES[mode].values(), *wanted)
        torch.library.opcheck(op.contrastive_loss_backward, backward)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break_at_two_lengths(mode) -> None:
    def step(queries, targets, scale, bias, groups, valid):
        slots = {"query_groups": groups, "target_groups": groups, "query_valid": valid, "target_valid": valid}
        return contrastive_loss(queries * 2, targets, scale, bias, **MODES[mode], **slots) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        tensors = list(operands(length, length, 8, torch.float32).values())
        slots = torch.arange(length) % 4, torch.arange(length) != 2
        eager, graph = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        want, got = step(*eager, *slots), compiled(*graph, *slots)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        for a, b in zip(eager, graph):
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [contrastive_loss, lambda *args: op.contrastive_loss(*args)])
def test_autocast_computes_in_float32(function) -> None:
    tensors = list(operands(9, 9, 8, torch.bfloat16).values())
    narrow, wide = ([t.to(dtype).requires_grad_() for t in tensors] for dtype in (torch.bfloat16, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(*narrow[:2], *wide[2:])
        loss.backward()
    want = function(*(tensor.detach().requires_grad_() for tensor in wide))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    scale = wide[2].grad.clone()
    again = [tensor.detach().requires_grad_() for tensor in wide]
    function(*again).backward()
    assert torch.equal(scale, again[2].grad)
    assert torch.equal(narrow[0].grad, again[0].grad.bfloat16())


def test_fake_gpu_tensors_take_the_kernel_path() -> None:
    with FakeTensorMode():
        queries = torch.empty(6, 8, device="cuda", dtype=torch.bfloat16)
        scale = torch.empty(1, device="cuda")
        groups = torch.empty(6, device="cuda", dtype=torch.int64)
        valid = torch.empty(6, device="cuda", dtype=torch.bool)
        slots = {"query_groups": groups, "target_groups": groups, "query_valid": valid, "target_valid": valid}
        loss, grads = contrastive_loss(queries, queries.clone(), scale, **slots, return_gradients=True)
        assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
        assert (grads.queries.shape, grads.queries.dtype, grads.logit_scale.shape) == ((6, 8), torch.bfloat16, (1,))
        wide = torch.empty(6, 8, device="cuda", dtype=torch.float64)
        with pytest.raises(KernelError, match=r"float16, got torch.float64"):
            contrastive_loss(wide, wide, scale)


@pytest.mark.parametrize("mode", MODES)
def test_meta_tensors_have_shapes(mode) -> None:
    features = torch.empty(6, 8, device="meta", requires_grad=True)
    scalars = torch.empty(1, device="meta"), torch.empty((), device="meta")
    loss = contrastive_loss(features, features.detach(), *scalars, **MODES[mode])
    loss.backward()
    assert (loss.shape, features.grad.shape) == ((), (6, 8))
