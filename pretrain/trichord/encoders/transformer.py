"""A small pre-norm transformer over padded items, shared by the towers that are trained from scratch.

Not torch's `nn.MultiheadAttention`: it uses `out_proj.weight` outside of `out_proj`'s forward, which bypasses the
hooks by which ZeRO-3 gathers parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MLP_RATIO = 4


class Block(nn.Module):
    """h = x + Att(LN(x)); y = h + MLP(LN(h)), bidirectional attention."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, _MLP_RATIO * hidden_size)
        self.fc2 = nn.Linear(_MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x_ILD: Tensor, mask: Tensor | None) -> Tensor:
        """x (I, L, D), mask (I, 1, 1, L) bool of visible keys or None -> (I, L, D)."""
        qkv = self.qkv(self.norm1(x_ILD)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (I, N, L, H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_ILD = x_ILD + self.proj(attended.transpose(1, 2).flatten(2))
        return x_ILD + self.fc2(F.gelu(self.fc1(self.norm2(x_ILD))))


class Transformer(nn.Module):
    """`num_layers` blocks and a final LayerNorm."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int):
        super().__init__()
        self.layers = nn.ModuleList([Block(hidden_size, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x_ILD: Tensor, mask: Tensor | None) -> Tensor:
        """As `Block.forward`."""
        for layer in self.layers:
            x_ILD = layer(x_ILD, mask)
        return self.norm(x_ILD)


def sinusoids(length: int, channels: int) -> Tensor:
    """(length, channels) fp32 on the CPU: sin then cos halves, wavelengths from 2 pi to 20,000 pi (as Whisper).

    For odd `channels` the last column is 0.
    """
    half = channels // 2
    with torch.device("cpu"):
        rates = torch.exp(-math.log(10_000.0) / max(1, half - 1) * torch.arange(half))
        angles = torch.arange(length)[:, None] * rates[None, :]
        return F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, channels - 2 * half))
