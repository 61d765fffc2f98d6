"""Attention by its definition: a dense mask from the visibility rule, and the cases the kernels are judged on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_rule import ErrorRatio, judge
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Lengths of the segments and everything else attention is called with. spans: [begin, end) stream positions."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    slack: int = 0
    causal: bool = True
    spans: tuple[tuple[int, int], ...] = ()
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    used: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    device: str = field(default="cpu", compare=False)

    @property
    def num_q(self) -> int:
        return sum(self.q_lengths) + self.slack

    @property
    def num_k(self) -> int:
        return self.num_q if self.k_lengths is None else sum(self.k_lengths) + self.slack

    def cu_seqlens(self) -> tuple[Tensor, Tensor | None]:
        return _bounds(self.q_lengths, self.device), _bounds(self.k_lengths, self.device)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `attention`."""
        span_ends = None
        if self.spans:
            span_ends = torch.arange(1, self.num_q + 1, dtype=torch.int32)
            for begin, end in self.spans:
                span_ends[begin:end] = end
            span_ends = span_ends.to(self.device)
        used = None if self.used is None else torch.tensor(self.used, dtype=torch.int32, device=self.device)
        same = {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}
        return {**same, "span_ends": span_ends, "seqused_k": used}

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v and the incoming gradient, normally distributed."""
        q_shape, k_shape = (self.num_q, self.heads, self.head_dim), (self.num_k, self.kv_heads, self.head_dim)
        shapes = {"q": q_shape, "k": k_shape, "v": k_shape, "grad": q_shape}
        return {name: torch.randn(shape, device=self.device).to(self.dtype) for name, shape in shapes.items()}


def _bounds(lengths: tuple[int, ...] | None, device: str) -> Any:
    if lengths is None:
        return None
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def visible(case: Case) -> Tensor:
    """(Tq, Tk) bool: which query sees which key, pair by pair from the rule's own words."""
    mask = torch.zeros(case.num_q, case.num_k, dtype=torch.bool)
    k_lengths = case.q_lengths if case.k_lengths is None else case.k_lengths
    q0 = k0 = 0
    for segment, (num_q, num_k) in enumerate(zip(case.q_lengths, k_lengths)):
        exist = num_k if case.used is None else min(num_k, case.used[segment])
        t, j = torch.arange(num_q)[:, None], torch.arange(exist)[None, :]
        shift = 0 if case.k_lengths is None else exist - num_q
        sees = (j <= t + shift) if case.causal else torch.ones(num_q, exist, dtype=torch.bool)
        if case.window is not None:
            sees = sees & ((t - j).abs() < case.window)
        for begin, end in case.spans:
            begin, end = begin - q0, end - q0
            sees = sees | ((t >= begin) & (t < end) & (j >= begin) & (j < end))
        mask[q0 : q0 + num_q, k0 : k0 + exist] = sees
        q0, k0 = q0 + num_q, k0 + num_k
    return mask.to(case.device)


def dense_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse as a model without fused kernels computes them: in the inputs' dtype, the softmax in float32."""
    groups = case.heads // case.kv_heads
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.head_dim)
    scores = torch.einsum("tnh,jnh->ntj", q, k) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, float("-inf"))
    blind = ~mask.any(dim=1)
    lse = scores.logsumexp(dim=-1)
    weights = scores.masked_fill(blind[:, None], 0.0).softmax(dim=-1).masked_fill(blind[:, None], 0.0).to(q.dtype)
    return torch.einsum("ntj,jnh->tnh", weights, v), lse.detach().float()


def dense_results(case: Case, tensors: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    leaves = [tensors[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, lse = dense_attention(case, *leaves, mask)
    grads = torch.autograd.grad(out, leaves, tensors["grad"].to(out.dtype))
    return dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out.detach(), lse, *grads)))


def results(run: Any, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse and all gradients of `run` (an `attention`). The inputs must come back unchanged."""
    before = {name: t.clone() for name, t in tensors.items()}
    leaves = [tensors[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, lse = run(*leaves, *case.cu_seqlens(), **case.options(), return_lse=True)
    grads = torch.autograd.grad(out, leaves, tensors["grad"])
    for name, t in tensors.items():
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} was changed"
    return dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out.detach(), lse, *grads)))


def judge_attention(
    run: Any,
    case: Case,
    tensors: dict[str, Tensor] | None = None,
    poison: float | None = None,
    runs: int = 1,
) -> list[ErrorRatio]:
    """Hold `run` to the kernel rule on a case. `poison`: what ours finds wherever nothing may be read; `runs` of them
    must give the same bits."""
    tensors = case.tensors() if tensors is None else tensors
    mask = visible(case)
    blind, unseen = ~mask.any(dim=1), ~mask.any(dim=0)
    clean = {
        "q": tensors["q"].masked_fill(blind[:, None, None], 0),
        "k": tensors["k"].masked_fill(unseen[:, None, None], 0),
        "v": tensors["v"].masked_fill(unseen[:, None, None], 0),
        "grad": tensors["grad"].masked_fill(blind[:, None, None], 0),
    }
    plain = dense_results(case, clean, mask)
    exact = dense_results(case, {name: t.double() for name, t in clean.items()}, mask)
    if poison is not None:
        hidden = {"q": blind, "grad": blind, "k": unseen, "v": unseen}
        tensors = {name: t.masked_fill(hidden[name][:, None, None], poison) for name, t in tensors.items()}
    ours = results(run, case, tensors)
    for _ in range(runs - 1):
        again = results(run, case, tensors)
        assert all(torch.equal(ours[name], again[name]) for name in ours), "another run gave other bits"
    assert torch.equal(ours["lse"] == float("-inf"), blind.expand_as(ours["lse"])), "lse of rows that see nothing"
    for name, rows in (("out", blind), ("grad_q", blind), ("grad_k", unseen), ("grad_v", unseen)):
        assert not ours[name][rows].any(), f"{name}: not 0 where nothing is seen"
        assert not ours[name].isnan().any(), f"{name}: NaN"
    for found in (ours, plain, exact):
        found["lse"] = found["lse"].masked_fill(blind, 0.0)
    exact["lse"] = exact["lse"].double()
    floors = _cancellation_floors(case, clean, exact, mask)
    return judge(ours, plain, exact, floors, factor=2.0 if case.softcap is None else 3.0)


def _cancellation_floors(
    case: Case, tensors: dict[str, Tensor], exact: dict[str, Tensor], mask: Tensor
) -> dict[str, float]:
    """What float32 costs dq and dk in any fused backward: d_out v^T - rowsum(d_out * out) are sums of like terms in
    different order, times p = exp(score - lse), where lse was rounded. It is all that is left where the softmax has
    nothing to decide (one key, or equal keys)."""
    q, k, v, grad = (tensors[name].double() for name in ("q", "k", "v", "grad"))
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, dim=1) for t in (k, v))
    eps = torch.finfo(torch.float32).eps * (1 / math.sqrt(case.head_dim) if case.scale is None else case.scale)
    finite_lse = exact["lse"].abs().nan_to_num(posinf=0.0).t()
    terms = eps * (1 + finite_lse) * (grad.abs() * exact["out"].abs()).sum(dim=-1)  # (Tq, N)
    if not terms.numel() or not mask.any():
        return {}
    lse = exact["lse"].t()
    scores = torch.einsum("tnh,jnh->ntj", q, k) * (eps / torch.finfo(torch.float32).eps)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = torch.exp(scores - lse.t()[..., None]).masked_fill(~mask, 0.0) * terms.t()[..., None]
    by_key = torch.einsum("ntj,tnh->jnh", weights, q.abs()).unflatten(1, (case.kv_heads, -1)).sum(dim=2)
    by_query = torch.einsum("ntj,jnh->tnh", weights, k.abs())
    return {"grad_q": by_query.max().item(), "grad_k": by_key.max().item()}
