"""Rotary position embedding of one or several axes through our kernel, with QK-norm in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.layers.constants import HostConstant
from trichord.layers.norm import RMSNorm
from trichord_kernels import rope

AXES = 3  # time, height, width
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not change with the length seen


def resolve_sections(sections: tuple[int, int, int] | None, head_dim: int) -> tuple[int, int, int]:
    """Frequencies per axis; None: head_dim / 2 shared as equally as possible, time first."""
    if sections is not None:
        return sections
    half = head_dim // 2
    return (half - 2 * (half // AXES), half // AXES, half // AXES)


@dataclass(frozen=True)
class Rotation:
    """What turns queries and keys of one forward; takes the place of transformers' `position_embeddings`.

    No cosine is stored: the kernel computes them from positions (T,) or (3, T) of all B * L tokens, row by row.
    """

    position_ids: Tensor
    inv_freq: Tensor
    sections: tuple[int, int, int] | None
    attention_scaling: float

    def turn(
        self, q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        """q (T, N, H) and k (T, K, H), normed over H first where weights are given."""
        return rope(
            q,
            k,
            self.position_ids,
            self.inv_freq,
            sections=self.sections,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            attention_scaling=self.attention_scaling,
        )


class Rotary(nn.Module):
    """Hands the positions and frequencies of a forward on to the attention modules.

    With `sections` each frequency reads its own axis of the position: the axes are dealt in turn (t h w t h w ...)
    until each has its share, so that every axis has fast and slow frequencies (as in Qwen3-VL); contiguous blocks
    would leave the width axis only slow ones, which cannot tell neighbouring columns apart. Where the three axes are
    equal the result equals the one-axis one bit for bit.
    """

    def __init__(self, inv_freq: Tensor, attention_scaling: float, sections: tuple[int, int, int] | None):
        super().__init__()
        if sections is not None and sum(sections) != inv_freq.numel():
            raise ConfigError(
                f"rope_sections {sections} sum to {sum(sections)}, but the trunk has {inv_freq.numel()} rotary "
                "frequencies (head_dim / 2); set fusion.trunk.rope_sections to match or to null"
            )
        self.sections = sections
        self.attention_scaling = attention_scaling
        self._frequencies = HostConstant(inv_freq)

    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        """x (B, L, D) gives batch and device; position_ids (B or 1, L), or with sections (3, B or 1, L), any number
        type."""
        rows = position_ids.expand(*position_ids.shape[:-2], x.shape[0], -1).flatten(-2)
        return Rotation(rows, self._frequencies.on(x.device), self.sections, self.attention_scaling)


class QueryNorm(RMSNorm):
    """The RMSNorm of query heads. Norm and rotation of queries and keys are one op, which takes the weights of two
    modules: it is called inside the forward of both, one within the other, so that ZeRO-3 has gathered both."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation, key_norm: KeyNorm) -> tuple[Tensor, Tensor]:
        """q (T, N, H), k (T, K, H) -> both normed and turned."""
        return key_norm(q, k, rotation, self)


class KeyNorm(RMSNorm):
    """The RMSNorm of key heads, called by the `QueryNorm` beside it."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation, query_norm: QueryNorm) -> tuple[Tensor, Tensor]:
        return rotation.turn(q, k, query_norm.weight, self.weight, self.variance_epsilon)


def replace_rotary(decoder: Any, sections: tuple[int, int, int] | None) -> Rotary:
    """Put a `Rotary` in the place of `decoder.rotary_emb`, keeping its frequencies; sections None: one axis.

    Raises:
        ConfigError: the model's rotary type changes its frequencies with the sequence length.
    """
    old = decoder.rotary_emb
    if old.rope_type not in _FIXED_ROPE_TYPES:
        raise ConfigError(f"the rotary type {old.rope_type!r} is not supported; expected one of {_FIXED_ROPE_TYPES}")
    inv_freq, scaling = _frequencies_on_host(old)
    decoder.rotary_emb = Rotary(inv_freq, scaling, sections)
    return decoder.rotary_emb


def _frequencies_on_host(rotary: Any) -> tuple[Tensor, float]:
    """Frequencies recomputed on the CPU: a module built on the meta device holds none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    init = (
        rotary.compute_default_rope_parameters
        if rotary.rope_type == "default"
        else ROPE_INIT_FUNCTIONS[rotary.rope_type]
    )
    with torch.device("cpu"):
        inv_freq, scaling = init(rotary.config)
    return inv_freq, float(scaling)
