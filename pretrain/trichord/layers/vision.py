"""Attention of timm's vision transformers through our kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trichord.layers.attention import attend
from trichord.layers.layout import PackedLayout


class ImageAttention(nn.Module):
    """timm's `Attention` with the same submodules, images as segments of equal length."""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Linear
    proj_drop: nn.Module

    def __init__(self, old: Any):
        super().__init__()
        for name, child in old.named_children():
            self.add_module(name, child)
        self.gate = old.gate  # None in most models
        self.head_dim, self.scale, self.dropout = old.head_dim, old.scale, old.attn_drop.p
        self.train(old.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, L, D) -> (B, L, D).

        Raises:
            ValueError: there is a mask, or attention dropout above 0 in training.
        """
        if attn_mask is not None:
            raise ValueError(
                "ImageAttention: expected no mask, got one; models with padded images keep timm's attention"
            )
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(1, (3, -1, self.head_dim)).unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        layout = PackedLayout.of_rows(batch, length, x.device, is_causal)
        out = attend(q, k, v, layout, self.scale, dropout=self.dropout if self.training else 0.0)
        out = self.norm(out.flatten(1).unflatten(0, (batch, length)))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def swap_image_attention(model: nn.Module) -> int:
    """Put an `ImageAttention` in the place of every `timm.layers.Attention` of `model`, around the same Parameters.

    Returns: how many were replaced; relatives of that class (relative positions, windows) stay.
    """
    from timm.layers import Attention

    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Attention:
                setattr(parent, name, ImageAttention(child))
                replaced += 1
    return replaced
