"""Who sees whom: the one place that states it, in plain torch, on any device and without a host sync.

A query's keys are always one interval of the stream, because its window and its span both hold the query itself; the
same holds for a key's queries, by the same rule mirrored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def key_intervals(
    num_queries: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    span_ends: Tensor | None = None,
    window: int | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys each query sees, as stream positions [first, last), two int64 (num_queries,); last <= first: none.

    This is the visibility rule itself, on any device, without a host sync.
    """
    position = torch.arange(num_queries, device=cu_seqlens_q.device)
    starts_q, ends_q = (part.long() for part in (cu_seqlens_q[:-1], cu_seqlens_q[1:]))
    starts_k, ends_k = (
        (starts_q, ends_q) if cu_seqlens_k is None else (cu_seqlens_k[:-1].long(), cu_seqlens_k[1:].long())
    )
    exists = ends_k if seqused_k is None else torch.minimum(ends_k, starts_k + seqused_k.long())
    outside = (position < cu_seqlens_q[0]) | (position >= cu_seqlens_q[-1])
    segment = torch.searchsorted(ends_q, position, right=True).clamp(max=ends_q.shape[0] - 1)
    if cu_seqlens_k is None:
        first, last = _self_intervals(position, starts_q[segment], ends_q[segment], causal, span_ends, window)
        last = torch.minimum(last, exists[segment])
    else:
        first, last = starts_k[segment], exists[segment]
        if causal:  # the last query sees the last key that exists
            last = torch.minimum(last, last - ends_q[segment] + position + 1)
    return first, torch.where(outside, first, last)


def _self_intervals(
    position: Tensor, start: Tensor, end: Tensor, causal: bool, span_ends: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    first = start if window is None else torch.maximum(start, position - window + 1)
    ahead = end if window is None else torch.minimum(end, position + window)
    last = position + 1 if causal else ahead
    if span_ends is None:
        return first, last
    span_begin, span_end = span_bounds(span_ends)
    first = torch.minimum(first, torch.maximum(span_begin.long(), start))
    return first, torch.maximum(last, torch.minimum(span_end.long(), end))


def span_bounds(span_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the span each token lies in, as stream positions, int32 (T,); no host sync.

    A span is a run of equal `span_ends`, values below the token's own position + 1 being read as that. Segments are not
    looked at: a span that crosses a boundary is cut by whoever knows the boundaries.
    """
    position = torch.arange(span_ends.shape[0], device=span_ends.device, dtype=torch.int32)
    end = torch.maximum(span_ends.to(torch.int32), position + 1)
    is_first = F.pad(end[1:] != end[:-1], (1, 0), value=True)[: end.shape[0]]
    begin = torch.where(is_first, position, 0)
    return begin.cummax(0).values if begin.numel() else begin, end
