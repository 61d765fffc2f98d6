"""merge_embeddings as a registered op on a CPU, as a compiler and a planner see it, and its compiled code."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trichord_kernels import merge_embeddings, reference
from trichord_kernels.ops import merge_embeddings as op
from trichord_kernels.static.cases.merge_embeddings import cases
from trichord_kernels.static.judge import judge_case


def _operands(num_rows: int, num_features: int):
    embeds, features, grad = (torch.randn(n, 24) for n in (num_rows, num_features, num_rows))
    positions = torch.randperm(num_rows)[:num_features].int()
    positions[:1] = -1
    return embeds, features, positions, grad


def test_opcheck() -> None:
    embeds, features, positions, grad = _operands(9, 4)
    leaves = embeds.requires_grad_(), features.t().contiguous().t().requires_grad_()
    torch.library.opcheck(op.merge_embeddings_forward, (*leaves, positions))
    torch.library.opcheck(op.merge_embeddings_backward, (grad, positions, True, True))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    compiled = torch.compile(merge_embeddings, fullgraph=True, backend="aot_eager")
    for num_rows, num_features in ((9, 4), (21, 8), (3, 0)):
        embeds, features, positions, grad = _operands(num_rows, num_features)
        results = []
        for function in (compiled, reference.merge_embeddings):
            leaves = [t.clone().requires_grad_() for t in (embeds, features)]
            out = function(*leaves, positions)
            out.backward(grad)
            results.append([out, *(leaf.grad for leaf in leaves)])
        for got, want in zip(*results):
            assert torch.equal(got, want)


def test_a_compiled_graph_still_refuses_positions_outside_the_stream() -> None:
    compiled = torch.compile(merge_embeddings, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="below the 3 rows of embeds, got 3"):
        compiled(torch.zeros(3, 8), torch.zeros(1, 8), torch.tensor([3]))


def test_shapes_without_values(monkeypatch) -> None:
    monkeypatch.delenv("TRICHORD_KERNELS", raising=False)
    with FakeTensorMode():
        embeds = torch.empty(6, 8, device="cuda", dtype=torch.bfloat16).t().contiguous().t()
        fake = merge_embeddings(embeds, embeds[:2], torch.empty(2, device="cuda", dtype=torch.int32))
    meta = merge_embeddings(*(torch.empty(n, 8, device="meta") for n in (6, 2)), torch.empty(2, device="meta").int())
    for out, device in ((fake, "cuda"), (meta, "meta")):
        assert (out.shape, out.device.type) == ((6, 8), device)
        assert out.is_contiguous()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("number", range(2))
def test_hard_bars_hold_on_sm_90(number) -> None:
    case = [case for case in cases("sm_90") if "bf16" in case.name][number]
    row = judge_case(case, "sm_90")
    assert row["failures"] == []
    assert {"1", "2", "4", "5", "6", "8"} <= set(row["bars"])
