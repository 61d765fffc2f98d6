"""Rope with head norms over q and k, against the same in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import rope
from trichord_kernels.bench.timing import bench_row, median_ms


def rows(device: torch.device, repeats: int) -> list[dict]:
    return [_bench_forward(device, repeats), _bench_backward(device, repeats), _bench_three_axes(device, repeats)]


def _bench_forward(device: torch.device, repeats: int) -> dict:
    """The rotation alone; the plain one gets cos and sin ready, as the layers of transformers' models do."""
    q, k, _, _ = _heads(device)
    positions, inv_freq = _positions(q)
    cos, sin = _plain_cos_and_sin(positions, inv_freq, q.dtype)
    with torch.no_grad():
        times = median_ms(
            lambda: rope(q, k, positions, inv_freq),
            lambda: (_plain_rotation(q, cos, sin), _plain_rotation(k, cos, sin)),
            device,
            repeats,
        )
    return bench_row("rope_fwd", q, times, num_bytes=2 * (q.nbytes + k.nbytes))


def _bench_backward(device: torch.device, repeats: int) -> dict:
    """Head norms and rotation, forward and backward with gradients of q, k and both weights."""
    leaves = tuple(t.requires_grad_() for t in _heads(device))
    q, k, q_weight, k_weight = leaves
    positions, inv_freq = _positions(q)
    cos, sin = _plain_cos_and_sin(positions, inv_freq, q.dtype)
    grads = (torch.randn_like(q), torch.randn_like(k))

    def ours() -> None:
        out = rope(q, k, positions, inv_freq, q_weight=q_weight, k_weight=k_weight)
        torch.autograd.grad(out, leaves, grads)

    def plain() -> None:
        normed = (F.rms_norm(x, w.shape, w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
        torch.autograd.grad(tuple(_plain_rotation(x, cos, sin) for x in normed), leaves, grads)

    times = median_ms(ours, plain, device, repeats)
    return bench_row("rope_norm_fwd_bwd", q, times, num_bytes=5 * (q.nbytes + k.nbytes))


def _bench_three_axes(device: torch.device, repeats: int) -> dict:
    """Three axes of positions and head norms, forward; the plain one selects the axis of each frequency itself."""
    q, k, q_weight, k_weight = _heads(device)
    positions, inv_freq = _positions(q)
    positions = positions.expand(3, -1).contiguous()
    sections = (24, 20, 20)
    axes = torch.tensor(([0, 1, 2] * 20 + [0] * 4), device=device)

    def plain() -> tuple[Tensor, ...]:
        cos, sin = _plain_cos_and_sin(positions[axes].T, inv_freq, q.dtype)
        normed = (F.rms_norm(x, w.shape, w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
        return tuple(_plain_rotation(x, cos, sin) for x in normed)

    with torch.no_grad():
        times = median_ms(
            lambda: rope(q, k, positions, inv_freq, sections=sections, q_weight=q_weight, k_weight=k_weight),
            plain,
            device,
            repeats,
        )
    return bench_row("rope_norm_3axes_fwd", q, times, num_bytes=2 * (q.nbytes + k.nbytes))


def _plain_cos_and_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, H) of positions (T,) or, one per frequency, (T, H / 2)."""
    angles = (positions if positions.dim() == 2 else positions[:, None]).float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _heads(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and the weights of their norms: 32 and 8 heads of 128."""
    tokens, heads, dtype = (16384, (32, 8), torch.bfloat16) if device.type == "cuda" else (512, (8, 2), torch.float32)
    q, k = (torch.randn(tokens, n, 128, device=device, dtype=dtype) for n in heads)
    q_weight, k_weight = (torch.randn(128, device=device, dtype=dtype) for _ in range(2))
    return q, k, q_weight, k_weight


def _positions(q: Tensor) -> tuple[Tensor, Tensor]:
    inv_freq = 10000.0 ** -(torch.arange(64, device=q.device).float() / 64)
    return torch.arange(q.shape[0], device=q.device), inv_freq
