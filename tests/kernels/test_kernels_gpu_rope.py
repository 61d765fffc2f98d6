"""What only a GPU can show of rope: bfloat16, large shapes, 64-bit offsets, no host sync, determinism."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import judge, sum_floor

from trichord_kernels import reference, rope

pytestmark = pytest.mark.gpu
EPS = 1e-5


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _inv_freq(num_frequencies):
    return 10000.0 ** -(torch.arange(num_frequencies, device="cuda") / num_frequencies)


def _heads(tokens, heads, kv_heads, head_dim, dtype):
    return {
        name: torch.randn(tokens, n, head_dim, device="cuda").to(dtype) for name, n in (("q", heads), ("k", kv_heads))
    }


def _run(function, inputs, others, grads):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves, **others)
    torch.autograd.backward(out, grads)
    outputs = {"q_out": out[0].detach(), "k_out": out[1].detach()}
    return outputs | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def _judge(inputs, others, grads) -> None:
    wide = {name: t.double() for name, t in inputs.items()}
    wide_grads = tuple(grad.double() for grad in grads)
    ours = _run(rope, inputs, others, grads)
    exact = _run(reference.rope, wide, others, wide_grads)
    turned_back, floors = dict(others, inv_freq=-others["inv_freq"]), {}
    for name, grad in zip(("q", "k"), reference.rope(*wide_grads, **turned_back)):
        if f"{name}_weight" in inputs:
            normed = reference.rms_norm(wide[name], torch.ones_like(wide[f"{name}_weight"]), EPS)
            floors[f"grad_{name}_weight"] = sum_floor((grad * normed).flatten(0, 1))
    judge(ours, _run(reference.rope, inputs, others, grads), exact, floors)
    for _ in range(3):
        again = _run(rope, inputs, others, grads)
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "num_frequencies"),
    [
        ((8191, 32, 8, 128), 64),
        ((4099, 28, 4, 128), 64),
        ((1031, 12, 12, 64), 32),
        ((513, 16, 1, 80), 40),
        ((513, 8, 8, 96), 48),
        ((257, 8, 4, 256), 128),
        ((515, 16, 2, 128), 32),
        ((65, 2, 1, 10), 3),
        ((1, 32, 8, 128), 64),
    ],
)
def test_error_rule(shape, num_frequencies, dtype, has_norms) -> None:
    inputs = _heads(*shape, dtype)
    grads = tuple(torch.randn_like(t) for t in inputs.values())
    if has_norms:
        inputs |= {name: torch.randn(shape[-1], device="cuda").to(dtype) for name in ("q_weight", "k_weight")}
    positions = torch.randint(0, 100_000, (shape[0],), device="cuda")
    _judge(inputs, {"position_ids": positions, "inv_freq": _inv_freq(num_frequencies), "eps": EPS}, grads)


@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
def test_three_axes_of_fractional_positions_on_strided_heads(layout) -> None:
    projected = torch.randn(1031, 28 + 4 + 4, 128, device="cuda").bfloat16()
    inputs = {"q": projected[:, :28], "k": projected[:, 28:32]}
    grads = tuple(torch.randn(t.shape[1], 1031, 128, device="cuda").bfloat16().transpose(0, 1) for t in inputs.values())
    inputs |= {name: torch.randn(128, device="cuda") for name in ("q_weight", "k_weight")}
    positions = torch.rand(1031, 3, device="cuda").T * 3000
    others = {"position_ids": positions, "inv_freq": _inv_freq(64), "eps": EPS}
    _judge(inputs, others | {"sections": (24, 20, 20), "layout": layout}, grads)


def test_cos_and_sin_are_exact_at_large_positions() -> None:
    positions = torch.randint(-1_000_000, 1_000_000, (65536,), device="cuda")
    inv_freq = _inv_freq(32)
    q = torch.cat([torch.ones(65536, 1, 32), torch.zeros(65536, 1, 32)], dim=-1).cuda()
    cos, sin = rope(q, q, positions, inv_freq)[0][:, 0].double().chunk(2, dim=-1)
    angles = (positions[:, None].float() * inv_freq).double()
    assert (cos - angles.cos()).abs().max() <= 2**-23
    assert (sin - angles.sin()).abs().max() <= 2**-23


def test_offsets_beyond_32_bits() -> None:
    heads = 64
    tokens = 2**31 // (heads * 128) + 3
    if torch.cuda.mem_get_info()[0] < 8 * tokens * heads * 128:
        pytest.skip("needs 17 GiB of free GPU memory")
    q = torch.zeros(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    q[-1] = torch.randn(heads, 128, device="cuda")
    k, positions = q[:, :1], torch.arange(tokens, device="cuda")
    got = rope(q, k, positions, _inv_freq(64))[0][-1:]
    want = reference.rope(q[-1:], k[-1:], positions[-1:], _inv_freq(64))[0]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_never_waits_for_the_device() -> None:
    inputs = _heads(257, 8, 2, 128, torch.bfloat16)
    inputs |= {name: torch.ones(128, device="cuda") for name in ("q_weight", "k_weight")}
    others = {"position_ids": torch.rand(3, 257, device="cuda"), "inv_freq": _inv_freq(64), "sections": (24, 20, 20)}
    grads = tuple(torch.randn_like(inputs[name]) for name in ("q", "k"))
    _run(rope, inputs, others, grads)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(rope, inputs, others, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
