"""What only a GPU can show of attention: bfloat16, real tiles, 64-bit offsets, no host sync, parallel determinism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_rule import Case, judge_attention

from trichord_kernels import attention, gated_cross_attention, reference

pytestmark = pytest.mark.gpu
NAN = float("nan")

KINDS = {
    "causal": Case((700, 1, 0, 333)),
    "causal_spans": Case((1000, 200), spans=((100, 600), (600, 620), (1100, 1190))),
    "window": Case((1000, 77), window=200),
    "window_spans": Case((1000,), window=100, spans=((200, 700),)),
    "window_both_sides": Case((1000, 77), window=200, causal=False),
    "whole_segments": Case((640, 129), causal=False),
    "cross": Case((300, 0, 200), (700, 128, 0), causal=False),
    "cross_causal": Case((300, 500), (700, 20)),
    "softcap": Case((700, 33), softcap=20.0),
    "used_keys": Case((700, 333), used=(130, 0)),
}


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_kinds(kind, dtype) -> None:
    case = replace(KINDS[kind], heads=4, kv_heads=2, head_dim=64, slack=150, dtype=dtype, device="cuda")
    judge_attention(attention, case, poison=NAN, runs=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 41, 64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype) -> None:
    case = replace(KINDS["causal_spans"], heads=4, kv_heads=1, head_dim=head_dim, dtype=dtype, device="cuda")
    judge_attention(attention, case, runs=3)


def test_many_segments() -> None:
    lengths = tuple(int(n) for n in torch.randint(0, 9, (1500,)))
    judge_attention(attention, Case(lengths, heads=1, head_dim=64, dtype=torch.bfloat16, device="cuda", slack=9))


def test_offsets_beyond_32_bits() -> None:
    tokens, heads, head_dim = 2**31 // (32 * 128) + 600, 32, 128
    if torch.cuda.mem_get_info()[0] < 14 * tokens * heads * head_dim:
        pytest.skip("needs 60 GiB of free GPU memory")
    q = torch.zeros(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    for t in (q, k, v):
        t[-500:] = torch.randn(500, heads, head_dim, device="cuda")
    bounds = torch.tensor([0, tokens - 500, tokens], dtype=torch.int32, device="cuda")
    out = attention(q, k, v, bounds, window=1000)
    tail = torch.tensor([0, 500], dtype=torch.int32, device="cuda")
    want = reference.attention(q[-500:], k[-500:], v[-500:], tail)
    torch.testing.assert_close(out[-500:], want, rtol=0.02, atol=0.02)


def test_never_waits_for_the_device() -> None:
    case = replace(KINDS["causal_spans"], head_dim=64, dtype=torch.bfloat16, device="cuda")
    t, bounds, options = case.tensors(), case.cu_seqlens(), case.options()
    cross = torch.tensor([0, 400, case.num_q], dtype=torch.int32, device="cuda")
    gate = torch.ones(1, device="cuda", requires_grad=True)

    def step() -> None:
        leaves = [t[name].detach().requires_grad_() for name in ("q", "k", "v")]
        out = attention(*leaves, *bounds, **options)
        gated_cross_attention(out, leaves[0], *leaves[1:], gate, cross, cross).backward(t["grad"])

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gate_size", [1, 8])
def test_gated_cross_attention(gate_size) -> None:
    case = Case((300, 0, 200), (700, 128, 0), 8, 2, 128, causal=False, dtype=torch.bfloat16, device="cuda")
    t = case.tensors()
    hidden, gate = torch.randn_like(t["q"]), torch.randn(gate_size, device="cuda")
    found = []
    for run in (gated_cross_attention, gated_cross_attention, reference.gated_cross_attention):
        leaves = [x.detach().requires_grad_() for x in (hidden, t["q"], t["k"], t["v"], gate)]
        out = run(*leaves, *case.cu_seqlens())
        found.append([out, *torch.autograd.grad(out, leaves, t["grad"])])
    for ours, again, plain in zip(*found):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, plain, rtol=0.03, atol=0.03 * float(plain.abs().max()))
