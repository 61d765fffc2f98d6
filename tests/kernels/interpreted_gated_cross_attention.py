"""Gated cross-attention's kernels, run by Triton's interpreter on the CPU (see interpreted_attention.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_rule import Case, dense_attention, visible
from kernel_rule import judge

from trichord_kernels import gated_cross_attention
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops import gated_cross_attention as op

LEAST_CASES = 14
NAN = float("nan")
NAMES = ("out", "grad_hidden", "grad_q", "grad_k", "grad_v", "grad_gate")
CASE = Case((33, 0, 5), (20, 4, 35), causal=False, slack=4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _operands(case: Case, gate_size: int, gate_dtype=None, hidden_dtype=None) -> dict[str, torch.Tensor]:
    tensors = case.tensors()
    hidden = torch.randn(tensors["q"].shape).to(hidden_dtype or case.dtype)
    gate = torch.randn(gate_size).to(gate_dtype or case.dtype)
    tensors["grad"] = tensors["grad"].to(hidden.dtype)
    return {"hidden": hidden, "q": tensors["q"], "k": tensors["k"], "v": tensors["v"], "gate": gate} | {
        "grad": tensors["grad"]
    }


def _run(function, operands) -> dict[str, torch.Tensor]:
    before = {name: t.clone() for name, t in operands.items()}
    leaves = [t.detach().requires_grad_() for name, t in operands.items() if name != "grad"]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, operands["grad"])
    for name, t in operands.items():
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} was changed"
    return dict(zip(NAMES, (out.detach(), *grads)))


def _hold(case: Case, operands, record_property) -> dict[str, torch.Tensor]:
    mask = visible(case)

    def dense(hidden, q, k, v, gate):
        attended, _ = dense_attention(case, q, k, v, mask)
        return (hidden + torch.tanh(gate)[:, None] * attended).to(hidden.dtype)

    def ours(hidden, q, k, v, gate):
        options = {"causal": case.causal, "softcap": case.softcap, "scale": case.scale}
        used = case.options()["seqused_k"]
        return gated_cross_attention(hidden, q, k, v, gate, *case.cu_seqlens(), seqused_k=used, **options)

    found, again = _run(ours, operands), _run(ours, operands)
    assert all(torch.equal(found[name], again[name]) for name in NAMES), "the second run gave other bits"
    exact = _run(dense, {name: t.double() for name, t in operands.items()})
    attended, _ = dense_attention(case, *(operands[name].double() for name in "qkv"), mask)
    terms = operands["grad"].double() * attended
    order = torch.finfo(torch.float32).eps * terms.abs().sum().item()
    rounding = 2 * torch.finfo(case.dtype).eps * terms.square().sum().sqrt().item()  # `attended` is kept in its dtype
    factor = 2.0 if case.softcap is None else 3.0
    ratios = judge(found, _run(dense, operands), exact, {"grad_gate": order + rounding}, factor)
    record_property("worst_error_ratio", max(r.ratio for r in ratios))
    return found


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "gate_size"),
    [(16, torch.float32, 1), (16, torch.float16, 2), (20, torch.float32, 2), (80, torch.float16, 1)],
)
def test_error_rule(head_dim, dtype, gate_size, record_property) -> None:
    case = replace(CASE, head_dim=head_dim, dtype=dtype)
    _hold(case, _operands(case, gate_size), record_property)


def test_causal_softcap_used_keys(record_property) -> None:
    case = replace(CASE, causal=True, softcap=2.0, used=(20, 0, 3))
    _hold(case, _operands(case, 2), record_property)


def test_half_features_in_a_float32_stream(record_property) -> None:
    case = replace(CASE, dtype=torch.float16)
    operands = _operands(case, 2, gate_dtype=torch.float32, hidden_dtype=torch.float32)
    found = _hold(case, operands, record_property)
    assert found["out"].dtype == found["grad_gate"].dtype == torch.float32
    assert found["grad_q"].dtype == torch.float16


def test_a_shut_gate_learns(record_property) -> None:
    """At gate 0 the output is hidden, the attention gets no gradient, and the gate does."""
    operands = _operands(CASE, 1)
    operands["gate"].zero_()
    found = _hold(CASE, operands, record_property)
    assert torch.equal(found["out"], operands["hidden"])
    assert not found["grad_q"].any()
    assert found["grad_gate"].abs() > 0.1


def test_rows_that_see_nothing_pass_hidden_on() -> None:
    """NaN wherever attention may not look: in queries without keys, their gradients, unused keys and the slack."""
    case = Case((20, 8), (10, 0), causal=False, slack=5)
    operands = _operands(case, 2)
    blind, unseen = ~visible(case).any(dim=1), ~visible(case).any(dim=0)
    poisoned = {name: t.clone() for name, t in operands.items()}
    for name, rows in (("q", blind), ("grad", blind), ("k", unseen), ("v", unseen)):
        poisoned[name][rows] = NAN

    def ours(hidden, q, k, v, gate):
        return gated_cross_attention(hidden, q, k, v, gate, *case.cu_seqlens())

    operands["grad"][blind] = 0
    want, got = _run(ours, operands), _run(ours, poisoned)
    assert torch.equal(got["out"][blind], operands["hidden"][blind])
    for name in ("out", "grad_q", "grad_k", "grad_v", "grad_gate"):
        assert torch.equal(got[name], want[name]), name


def test_gate_gradient_over_several_tiles(monkeypatch, record_property) -> None:
    monkeypatch.setattr(op, "GATE_TILE_ELEMENTS", 128)  # 8 rows of 16
    _hold(CASE, _operands(CASE, 2), record_property)


def test_strided_hidden_and_gradient(record_property) -> None:
    operands = _operands(CASE, 2)
    operands["hidden"] = operands["hidden"].transpose(0, 2).contiguous().transpose(0, 2)
    operands["grad"] = torch.ones(()).expand(operands["grad"].shape)
    _hold(CASE, operands, record_property)


def test_only_the_stream_needs_a_gradient() -> None:
    operands = _operands(CASE, 1)
    hidden = operands["hidden"].requires_grad_()
    out = gated_cross_attention(*(operands[n] for n in ("hidden", "q", "k", "v", "gate")), *CASE.cu_seqlens())
    out.backward(operands["grad"])
    assert torch.equal(hidden.grad, operands["grad"])
    assert hidden.grad.data_ptr() != operands["hidden"].data_ptr()


def test_gate_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    operands = _operands(CASE, 2)
    gate = torch.nn.Parameter(operands["gate"].clone())
    q = operands["q"].requires_grad_()
    out = gated_cross_attention(operands["hidden"], q, operands["k"], operands["v"], gate, *CASE.cu_seqlens())
    gate.data = torch.zeros(2)  # so the backward really reads the Parameter, not a copy made in forward
    out.backward(operands["grad"])
    assert not q.grad.any()


def test_opcheck() -> None:
    case = Case((8, 4), (6, 5), heads=1, causal=False)
    t = _operands(case, 1)
    rule = (*case.cu_seqlens(), None, False, None, 0.25)
    leaves = [t[name].requires_grad_() for name in ("hidden", "q", "k", "v", "gate")]
    torch.library.opcheck(op.gated_cross_attention_forward, (*leaves, *rule))
    _, attended, lse = op.gated_cross_attention_forward(*leaves, *rule)
    saved = [x.detach() for x in (t["grad"], *leaves[1:], attended, lse)]
    torch.library.opcheck(op.gated_cross_attention_backward, (*saved, *rule))
