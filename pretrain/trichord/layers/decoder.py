"""Attention and layers of a transformers decoder with our kernels in their place; Parameters and names stay."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from trichord.layers.attention import trichord_attention
from trichord.layers.norm import ResidualRMSNorm
from trichord.layers.rope import KeyNorm, QueryNorm, Rotation


class DecoderAttention(nn.Module):
    """Self-attention of Llama, Mistral, Qwen2 and Qwen3: projections, QK-norm with rotation as one op, attention.

    Takes over the projections of the module it replaces. Queries and keys stay (T, N, H), T = B * L, all the way.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, old: Any):
        super().__init__()
        for name, child in old.named_children():
            self.add_module(name, child)
        self.has_norms = hasattr(old, "q_norm")
        if self.has_norms:
            self.q_norm, self.k_norm = QueryNorm.in_place_of(old.q_norm), KeyNorm.in_place_of(old.k_norm)
        self.config, self.layer_idx = old.config, old.layer_idx
        self.head_dim, self.scaling, self.attention_dropout = old.head_dim, old.scaling, old.attention_dropout
        self.num_key_value_groups, self.is_causal = old.num_key_value_groups, old.is_causal
        # Mistral has it in the config, Qwen per layer, Llama nowhere.
        self.sliding_window = getattr(old, "sliding_window", getattr(old.config, "sliding_window", None))
        self.train(old.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, L, D) -> (B, L, D), and None for the weights that are never there."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        batch, length, _ = hidden_states.shape
        rows = hidden_states.flatten(0, 1)
        q, k, v = (p(rows).unflatten(1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q, k, position_embeddings, self.k_norm) if self.has_norms else position_embeddings.turn(q, k)
        q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, trichord_attention)
        out, _ = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), None


class _FusedResidual:
    """The forward of a decoder layer whose second norm takes the residual sum with it."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: ResidualRMSNorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D); the keyword arguments go to the attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, residual = self.post_attention_layernorm(attended, hidden_states)
        return residual + self.mlp(normed)


@cache
def _fused_class(old: type) -> type:
    """A subclass of transformers' own layer class and of the same name: recording of hidden states, activation
    checkpointing and wrapping policies go by these."""
    return type(old.__name__, (_FusedResidual, old), {"__module__": __name__})


def fuse_layer(layer: Any) -> Any:
    """The decoder layer with our attention and norms; its modules and Parameters are taken over."""
    layer.self_attn = DecoderAttention(layer.self_attn)
    layer.post_attention_layernorm = ResidualRMSNorm.in_place_of(layer.post_attention_layernorm)
    fused = nn.Module.__new__(_fused_class(type(layer)))
    fused.__dict__.update(layer.__dict__)
    return fused
