"""Who sees whom in a batch of tokens that lie end to end, in the form our attention takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """The arguments of `trichord_kernels.attention` that describe visibility; the same for all layers of a forward.

    T is the number of tokens of the batch, row by row; S the number of segments.
    """

    cu_seqlens: Tensor
    """(S+1,) int32: where the segments start and end."""
    seqused_k: Tensor | None = None
    """(S,) int32: how many keys of each segment exist; 0 for slack, which then costs nothing. None: all."""
    span_ends: Tensor | None = None
    """(T,) int32: for tokens of a bidirectional span the position just behind it, for others their own + 1."""
    causal: bool = True
    window: int | None = None

    @property
    def ndim(self) -> int:
        """As of a finished mask (B, 1, L, L): with a cache of fixed size transformers makes the mask before the forward
        pass, hands it over as the attention mask, and asks for this and for `contiguous`."""
        return 4

    def contiguous(self) -> PackedLayout:
        return self

    @staticmethod
    def build(cu_seqlens: Tensor, segment_ids: Tensor, span_ends: Tensor | None) -> PackedLayout:
        """The layout of a packed stream: cu_seqlens (C+1,) of all runs, segment_ids (T,) with slack below 0, span_ends
        (T,) or None for causal throughout; integers, one device. Reads nothing on the host."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        starts = cu_seqlens[:-1].long().clamp(max=max(segment_ids.shape[0] - 1, 0))
        used = torch.where(segment_ids[starts] < 0, 0, cu_seqlens.diff())
        spans = None if span_ends is None else span_ends.to(torch.int32)
        return PackedLayout(cu_seqlens, used.to(torch.int32), spans)

    @staticmethod
    def of_rows(rows: int, length: int, device: torch.device, causal: bool, window: int | None = None) -> PackedLayout:
        """`rows` sequences of the same length without padding."""
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return PackedLayout(cu_seqlens, None, None, causal, window)

    @staticmethod
    def of_padding(mask: Tensor, causal: bool, window: int | None = None) -> PackedLayout | None:
        """The layout of padded rows: mask (B, L) bool, True for real tokens. Reads the device once.

        A row is two segments, its left padding, where no key exists, and the rest, where the first so many keys exist:
        so tokens stay where they are, and queries on padding get what a dense mask would give them. None where that
        is no description: holes between real tokens, or left padding without causality.
        """
        batch, length = mask.shape
        count = mask.sum(1)
        start = mask.int().argmax(1)
        last = length - 1 - mask.flip(1).int().argmax(1)
        has_holes = (count > 0) & (last - start + 1 != count)
        facts = torch.stack((has_holes.any(), (start > 0).any(), (count < length).any())).tolist()
        if facts[0] or (facts[1] and not causal):
            return None
        if not facts[2]:
            return PackedLayout.of_rows(batch, length, mask.device, causal, window)
        row = torch.arange(batch, device=mask.device) * length
        starts = torch.stack((row, row + start), dim=1).flatten()
        cu_seqlens = torch.cat((starts, starts.new_full((1,), batch * length)))
        used = torch.stack((torch.zeros_like(count), count), dim=1).flatten()
        return PackedLayout(cu_seqlens.to(torch.int32), used.to(torch.int32), None, causal, window)

    @staticmethod
    def of_sequences(sequence: Tensor, causal: bool, window: int | None = None) -> PackedLayout:
        """The layout of rows of several sequences each: sequence (B, L), any numbers, a new one at each change. Reads
        the number of sequences from the device."""
        is_first = torch.ones_like(sequence, dtype=torch.bool)
        is_first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
        starts = is_first.flatten().nonzero()[:, 0]
        cu_seqlens = torch.cat((starts, starts.new_full((1,), sequence.numel())))
        return PackedLayout(cu_seqlens.to(torch.int32), None, None, causal, window)
