"""Multi-axis rotary position embedding, in the place of the trunk's one-axis module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.layers.constants import HostConstant

AXES = 3  # time, height, width
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not change with the length seen


def resolve_sections(sections: tuple[int, int, int] | None, head_dim: int) -> tuple[int, int, int]:
    """Frequencies per axis; None: head_dim / 2 shared as equally as possible, time first."""
    if sections is not None:
        return sections
    half = head_dim // 2
    return (half - 2 * (half // AXES), half // AXES, half // AXES)


def assign_axes(sections: tuple[int, int, int]) -> list[int]:
    """The axis of each rotary frequency, high to low: dealt in turn (t h w t h w ...) until an axis has its share.

    Dealing in turn gives every axis fast and slow frequencies (as in Qwen3-VL); contiguous blocks would leave the
    width axis only slow ones, which cannot tell neighbouring columns apart.
    """
    left = list(sections)
    axes = []
    while any(left):
        for axis in range(AXES):
            if left[axis]:
                left[axis] -= 1
                axes.append(axis)
    return axes


class MultiAxisRotary(nn.Module):
    """cos and sin of position * frequency, each frequency reading its own axis of the position.

    Positions (B, L) turn all frequencies by the same axis; positions (3, B, L) by time, height and width. Where the
    three axes are equal the result equals the one-axis one bit for bit.
    """

    def __init__(self, inv_freq: Tensor, attention_scaling: float, sections: tuple[int, int, int]):
        super().__init__()
        if sum(sections) != inv_freq.numel():
            raise ConfigError(
                f"rope_sections {sections} sum to {sum(sections)}, but the trunk has {inv_freq.numel()} rotary "
                "frequencies (head_dim / 2); set fusion.trunk.rope_sections to match or to null"
            )
        self.sections = sections
        self.attention_scaling = attention_scaling
        self._frequencies = HostConstant(inv_freq)
        axes = torch.tensor(assign_axes(sections), device="cpu")
        self._selectors = HostConstant(torch.nn.functional.one_hot(axes, AXES).T)  # (3, H/2) of 0 and 1

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x gives dtype and device; position_ids (B, L) or (3, B, L), any number type -> cos, sin (B, L, H)."""
        frequencies = self._frequencies.on(x.device)
        positions = position_ids[..., None].float()
        if position_ids.ndim == 3:
            # One term of the sum is the position, the others exact zeros: a selection without an index copy.
            selectors = self._selectors.on(x.device)
            positions = sum(positions[axis] * selectors[axis] for axis in range(AXES))
        with torch.autocast(x.device.type, enabled=False):
            angles = positions * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            cos = angles.cos() * self.attention_scaling
            sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def replace_rotary(decoder: Any, sections: tuple[int, int, int] | None) -> MultiAxisRotary:
    """Put a `MultiAxisRotary` in the place of `decoder.rotary_emb`, keeping its frequencies.

    Raises:
        ConfigError: the trunk's rotary type changes its frequencies with the sequence length.
    """
    old = decoder.rotary_emb
    if old.rope_type not in _FIXED_ROPE_TYPES:
        raise ConfigError(
            f"the trunk's rotary type {old.rope_type!r} is not supported; expected one of {_FIXED_ROPE_TYPES}"
        )
    inv_freq, scaling = _frequencies_on_host(old)
    rotary = MultiAxisRotary(inv_freq, scaling, resolve_sections(sections, 2 * inv_freq.numel()))
    decoder.rotary_emb = rotary
    return rotary


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
