"""Attention over packed segments: the definition of correct, and the path of CPUs.

Shape letters: T packed tokens, S segments, N query heads, K key/value heads, H head dim.

A query's keys are always one interval (`visibility.py`). Where a segment's intervals are plain (all keys, or all up to
the query) it is one call of torch's own attention without a mask; elsewhere query rows go in chunks, each against the
keys that any of them sees, so that no mask is larger than `_MASK_ROWS` x (keys of the chunk). Softcap and the
log-sum-exp, which torch's attention does not offer, take an explicit softmax over the same chunks; its chunks are
computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trichord_kernels.operands import autocast_is_on, require_above_zero, without_autocast
from trichord_kernels.reference.visibility import key_intervals

_MASK_ROWS = 256  # query rows per masked call: intervals of near rows are near, so few masked pairs are computed
_SCORE_ELEMENTS = 2**22  # scores that the explicit path holds at once: 16 MiB in float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    span_ends: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v` within segments; `trichord_kernels.attention` documents arguments and visibility.

    Any head dim and float64 are allowed too. Softmax statistics and lse are float32 (float64 for float64). Reads the
    boundaries on the host. Under autocast q, k and v are cast to its dtype, as torch's own attention does.

    Raises:
        ValueError: operands that do not fit, or boundaries that leave the stream.
    """
    check_operands(q, k, v, cu_seqlens_q, cu_seqlens_k, span_ends, window, softcap, seqused_k, dropout)
    device = q.device.type
    if autocast_is_on(device) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    rule = _Rule(
        causal=causal,
        span_ends=span_ends,
        window=window,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        explicit=softcap is not None or return_lse,
    )
    with without_autocast(device):
        out, lse = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, rule)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@dataclass(frozen=True)
class _Rule:
    """What holds for every segment of a call. `explicit`: softmax in steps, for softcap and lse."""

    causal: bool
    span_ends: Tensor | None
    window: int | None
    softcap: float | None
    scale: float
    explicit: bool


@dataclass(frozen=True)
class _Segment:
    """Host view of a segment: lengths of queries and keys, keys that exist, and whether intervals are needed."""

    start_q: int
    start_k: int
    num_q: int
    num_k: int
    used_k: int
    masked: bool


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    rule: _Rule,
) -> tuple[Tensor, Tensor | None]:
    """All segments in turn. (Tq, N, H) out, and (N, Tq) lse where the rule is explicit."""
    segments = _read_segments(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, rule)
    if _all_alike(segments, q.shape[0], k.shape[0]) and not rule.explicit:
        q, k, v = (t.unflatten(0, (len(segments), -1)) for t in (q, k, v))
        return _torch_attention(q, k, v, None, rule, is_causal=rule.causal).flatten(0, 1), None
    intervals = None
    if rule.explicit or any(segment.masked for segment in segments):
        intervals = key_intervals(
            q.shape[0],
            cu_seqlens_q,
            cu_seqlens_k,
            causal=rule.causal,
            span_ends=rule.span_ends,
            window=rule.window,
            seqused_k=seqused_k,
        )
    # split, not slices: the gradient of a split is one concatenation, that of each slice a tensor of the full size
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    gaps_q, gaps_k = _split_lengths(segments, q.shape[0], k.shape[0])
    for segment, q_piece, k_piece, v_piece in zip(
        segments, q.split(gaps_q)[1:-1], k.split(gaps_k)[1:-1], v.split(gaps_k)[1:-1]
    ):
        if segment.used_k < segment.num_k:
            k_piece, v_piece = k_piece[: segment.used_k], v_piece[: segment.used_k]
        for out, lse in _segment_attention(q_piece, k_piece, v_piece, segment, intervals, rule):
            outs.append(out)
            lses.append(lse)
    head, tail = gaps_q[0], gaps_q[-1]
    out = torch.cat([q.new_zeros(head, *q.shape[1:]), *outs, q.new_zeros(tail, *q.shape[1:])])
    if not out.requires_grad:  # nobody sees anything: the gradients are zeros then, not absent
        out = out + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    if not rule.explicit:
        return out, None
    nothing = [_empty_lse(q[:length]) for length in (head, tail)]
    return out, torch.cat([nothing[0], *lses, nothing[1]], dim=1)


def _read_segments(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, rule: _Rule
) -> list[_Segment]:
    bounds_q = _read_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_k = bounds_q if cu_seqlens_k is None else _read_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    used = [end - start for start, end in itertools.pairwise(bounds_k)]
    if seqused_k is not None:
        used = [max(0, min(length, limit)) for length, limit in zip(used, seqused_k.tolist())]
    spans_before = _count_spans(rule.span_ends, bounds_q)
    segments = []
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k))):
        shifted = rule.causal and cu_seqlens_k is not None and q1 - q0 != used[index]
        windowed = rule.window is not None and rule.window < q1 - q0
        has_span = (rule.causal or windowed) and spans_before[index + 1] > spans_before[index]
        segments.append(_Segment(q0, k0, q1 - q0, k1 - k0, used[index], shifted or windowed or has_span))
    return segments


def _read_bounds(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0 or bounds[-1] > total or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"attention: expected {name} to rise from 0 to at most {total} tokens, got {bounds[:8]}"
            f"{' ...' if len(bounds) > 8 else ''} up to {bounds[-1]}; pass the running sum of the segments' lengths"
        )
    return bounds


def _count_spans(span_ends: Tensor | None, bounds: list[int]) -> list[int]:
    """How many tokens before each boundary see further ahead than themselves."""
    if span_ends is None:
        return [0] * len(bounds)
    after_self = torch.arange(1, span_ends.shape[0] + 1, device=span_ends.device)
    ahead = F.pad((span_ends > after_self).cumsum(0), (1, 0))
    return ahead[torch.tensor(bounds, device=ahead.device)].tolist()


def _all_alike(segments: list[_Segment], total_q: int, total_k: int) -> bool:
    """Whether the stream is a plain batch: equal lengths without gaps, all keys there, no intervals needed."""
    first = segments[0]
    return (
        first.num_q > 0
        and first.used_k > 0
        and first.num_q * len(segments) == total_q
        and first.num_k * len(segments) == total_k
        and all(
            not s.masked and (s.num_q, s.num_k, s.used_k) == (first.num_q, first.num_k, first.num_k) for s in segments
        )
    )


def _split_lengths(segments: list[_Segment], total_q: int, total_k: int) -> tuple[list[int], list[int]]:
    """Lengths of the head, every segment and the tail, of queries and of keys."""
    first, last = segments[0], segments[-1]
    lengths_q = [first.start_q, *(s.num_q for s in segments), total_q - last.start_q - last.num_q]
    lengths_k = [first.start_k, *(s.num_k for s in segments), total_k - last.start_k - last.num_k]
    return lengths_q, lengths_k


def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segment: _Segment, intervals: tuple[Tensor, Tensor] | None, rule: _Rule
) -> Iterator[tuple[Tensor, Tensor]]:
    """(out, lse) by chunks of query rows; the lse has 0 columns unless the rule is explicit."""
    if not q.shape[0] or not k.shape[0]:
        yield torch.zeros_like(q), _empty_lse(q)
    elif rule.explicit or segment.masked:
        assert intervals is not None
        own = slice(segment.start_q, segment.start_q + segment.num_q)
        first, last = (t[own] - segment.start_k for t in intervals)
        rows = max(1, min(_MASK_ROWS, _SCORE_ELEMENTS // (q.shape[1] * k.shape[0])))
        for q_rows, first_rows, last_rows in zip(q.split(rows), first.split(rows), last.split(rows)):
            yield _rows_attention(q_rows, k, v, first_rows, last_rows, rule)
    else:
        # Keys that do not exist are cut off at the end, so torch's alignment (top left) is ours.
        out = _torch_attention(q[None], k[None], v[None], None, rule, is_causal=rule.causal)
        yield out[0], q.new_empty(q.shape[1], 0)


def _rows_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    """Some query rows of a segment against its keys [first, last) each (counted from the segment's first key)."""
    blind = last <= first
    if bool(blind.all()):
        return torch.zeros_like(q), _empty_lse(q)
    begin, end = int(first[~blind].min()), int(last[~blind].max())
    if end - begin < k.shape[0]:
        k, v = k[begin:end], v[begin:end]
    keys = torch.arange(begin, end, device=q.device)
    mask = (keys >= first[:, None]) & (keys < last[:, None])
    # A row that sees nothing may hold NaN: it is computed from zeros against all keys, and its result thrown away.
    has_blind = bool(blind.any())
    if has_blind:
        q = q.masked_fill(blind[:, None, None], 0)
        mask = mask | blind[:, None]
    if rule.explicit:
        run = partial(_explicit_attention, scale=rule.scale, softcap=rule.softcap)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            out, lse = checkpoint(run, q, k, v, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            out, lse = run(q, k, v, mask)
    else:
        out, lse = (
            _torch_attention(q[None], k[None], v[None], mask, rule, is_causal=False)[0],
            q.new_empty(q.shape[1], 0),
        )
    if has_blind:
        out = out.masked_fill(blind[:, None, None], 0)
        lse = lse.masked_fill(blind, float("-inf")) if rule.explicit else lse
    return out, lse


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: _Rule, is_causal: bool) -> Tensor:
    """q (B, L, N, H), k and v (B, M, K, H), mask (L, M) or None -> (B, L, N, H)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """q (L, N, H), k and v (M, K, H), mask (L, M) with a key in every row -> out (L, N, H), lse (N, L).

    Scores and statistics in float32; probabilities are rounded to q's dtype before they meet v, as in fused attention.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    num_kv_heads = k.shape[1]
    grouped = q.to(wide).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # (K, N/K, L, H)
    keys = k.to(wide).permute(1, 2, 0)[:, None]  # (K, 1, H, M)
    values = v.to(wide).transpose(0, 1)[:, None]  # (K, 1, M, H)
    scores = grouped @ keys * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # (K, N/K, L)
    probabilities = torch.exp(scores - lse[..., None]).to(q.dtype).to(wide)
    out = (probabilities @ values).permute(2, 0, 1, 3).flatten(1, 2)
    return out.to(q.dtype), lse.detach().flatten(0, 1)


def _empty_lse(q: Tensor) -> Tensor:
    """(N, L) of -inf for rows q (L, N, H) that see nothing."""
    return q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))


def check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    span_ends: Tensor | None,
    window: int | None,
    softcap: float | None,
    seqused_k: Tensor | None,
    dropout: float,
    name: str = "attention",
) -> None:
    """Raise ValueError unless shapes, dtypes, devices and options fit (both paths refuse the same mistakes)."""
    _check_heads(name, q, k, v)
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{name}: expected as many keys as queries without cu_seqlens_k, got {k.shape[0]} keys for {q.shape[0]} "
            "queries; pass cu_seqlens_k for cross-attention"
        )
    if cu_seqlens_k is not None and (span_ends is not None or window is not None):
        raise ValueError(
            f"{name}: expected no span_ends and no window with cu_seqlens_k, got "
            f"{'span_ends' if span_ends is not None else f'window {window}'}; both are defined for self-attention only"
        )
    segments = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q.dim() == 1 else 0
    _check_integers(name, "cu_seqlens_q", cu_seqlens_q, (max(segments, 1) + 1,), q.device)
    _check_integers(name, "cu_seqlens_k", cu_seqlens_k, (segments + 1,), q.device)
    _check_integers(name, "seqused_k", seqused_k, (segments,), q.device)
    _check_integers(name, "span_ends", span_ends, (q.shape[0],), q.device)
    if window is not None and window < 1:
        raise ValueError(f"{name}: expected window to be None or at least 1, got {window}; 1 is the query itself only")
    require_above_zero(name, softcap=softcap)
    if dropout:
        raise ValueError(f"{name}: expected dropout 0, got {dropout}; attention dropout is not offered, set it to 0")


def _check_heads(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == 3 and k.dim() == 3 and q.shape[2] > 0 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}: expected q (Tq, N, H), k and v (Tk, K, H) with N a multiple of K, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}; flatten batches into one packed stream"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"{name}: expected q, k and v in one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"{name}: expected q, k and v on one device, got {q.device}, {k.device}, {v.device}; move them"
        )


def _check_integers(name: str, what: str, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if values is None:
        return
    if tuple(values.shape) != shape or values.dtype != torch.int32 or values.device != device:
        raise ValueError(
            f"{name}: expected {what} {shape} int32 on {device}, got {tuple(values.shape)} {values.dtype} on "
            f"{values.device}; cast, move or reshape it"
        )
