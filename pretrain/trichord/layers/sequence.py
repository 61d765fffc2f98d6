"""Sequence parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023): a group of ranks shares the tokens of the same rows.

Everything but attention is done token by token, by the rank whose stretch a token is in. For attention, tokens are
exchanged for heads: each rank sees the whole sequence with its share of the heads, and exchanges back.

Shapes: T tokens of the stream, P ranks, N query and K key heads, H of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """Rows (R, ...) sent in rank order, so many to each; the backward pass sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchange(rows, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(rows: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> Tensor:
    output = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), receive, send, group=group)
    return output


class SequenceGroup:
    """The ranks that share rows. Every method is a collective: all of them call it, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.place, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, rows: Tensor, have: Sequence[int], need: Sequence[int]) -> Tensor:
        """Rows of a tensor that lies over the ranks, from one division to another: rank r has rows have[r] to
        have[r + 1] of it, and gets need[r] to need[r + 1]. Both begin at 0 and end at the number of rows."""
        send = [_overlap(have, self.place, need, peer) for peer in range(self.size)]
        receive = [_overlap(have, peer, need, self.place) for peer in range(self.size)]
        return _Exchange.apply(rows, self.group, send, receive)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T / P, N, H), k and v (T / P, K, H) of this rank's tokens -> (T, N / P, H), (T, K / P, H) of its heads.

        Where there are fewer key heads than ranks, each goes to all ranks whose queries ask it.
        """
        k, v = (t.repeat_interleave(max(1, self.size // t.shape[1]), dim=1) for t in (k, v))
        split = [t.shape[1] // self.size for t in (q, k, v)]
        # One message: each peer's heads of the three side by side.
        packed = torch.cat([t.unflatten(1, (self.size, -1)) for t in (q, k, v)], dim=2)  # (T / P, P, heads, H)
        mine = self._swap(packed.transpose(0, 1)).flatten(0, 1)
        q, k, v = mine.split(split, dim=1)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """(T, N / P, H) of this rank's heads -> (T / P, N, H) of its tokens."""
        mine = self._swap(out.unflatten(0, (self.size, -1)))  # (P, T / P, N / P, H)
        return mine.transpose(0, 1).flatten(1, 2)

    def _swap(self, parts: Tensor) -> Tensor:
        """parts (P, ...): one for each rank -> (P, ...): one from each rank."""
        ones = [1] * self.size
        return _Exchange.apply(parts, self.group, ones, ones)


def _overlap(have: Sequence[int], giver: int, need: Sequence[int], taker: int) -> int:
    return max(0, min(have[giver + 1], need[taker + 1]) - max(have[giver], need[taker]))
