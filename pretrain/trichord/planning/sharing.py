"""Sequence parallelism in a plan: one rank's part of the model over shapes alone, and what its group exchanges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig, ranks_refusal, tokens_refusal, trunk_refusal
from trichord.engine.sequence import trunk_heads_refusal
from trichord.layers.sequence import SequenceGroup
from trichord.planning.comms import Collective
from trichord.planning.recomputation import moves_again

_WHAT = {"attention": "tokens for heads", "features": "features of items"}


class ShapeGroup(SequenceGroup):
    """The last rank of a group of `size`, alone: nothing is sent, sizes are right. sent: is told the bytes that a rank
    puts into each exchange, on average.

    Items are shared out so that the last rank never has fewer than another."""

    def __init__(self, size: int, sent: Callable[[float], None]) -> None:
        self.place, self.size, self._sent = size - 1, size, sent

    def exchange(self, rows: Tensor, have: Sequence[int], need: Sequence[int]) -> Tensor:
        each = rows[:1].numel() if len(rows) else rows.new_empty(1, *rows.shape[1:]).numel()
        self._sent(have[-1] * each * rows.element_size() / self.size)
        return _Sized.apply(rows, need[self.place + 1] - need[self.place])

    def _swap(self, parts: Tensor) -> Tensor:
        self._sent(parts.numel() * parts.element_size())
        return _Sized.apply(parts, len(parts))


class _Sized(torch.autograd.Function):
    """So many rows like those given; keeps nothing for the backward pass, as an exchange does not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int) -> Tensor:
        return rows.new_empty(number, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise NotImplementedError("a plan runs forward only")


def check_sharing(model: Any, engine: EngineConfig, micro_tokens: int, ranks: int) -> None:
    """Raises ConfigError: groups of `engine.sequence_parallel` do not fit the job, the tokens of a micro-step or the
    trunk's heads."""
    size = engine.sequence_parallel
    has_trunk = model.trunk is not None
    refusals = [ranks_refusal(size, ranks), trunk_refusal(size, has_trunk), tokens_refusal(size, micro_tokens)]
    if size > 1 and has_trunk:
        refusals.append(trunk_heads_refusal(model, size))
    for refusal in filter(None, refusals):
        raise ConfigError(refusal)


def exchanges(
    sent: Mapping[str, float], messages: Mapping[str, int], engine: EngineConfig, accumulation: int
) -> Iterator[Collective]:
    """Of one step. sent, messages: of the forward pass of a micro-step; what it sends comes back as gradients. Blocks
    that activation checkpointing runs again send again."""
    again = moves_again(engine)
    for kind, size in sent.items():
        passes = accumulation * (2 + again * (kind == "attention"))
        number = round(passes * messages[kind])
        yield Collective(_WHAT[kind], "all_to_all", round(passes * size), number, ranks=engine.sequence_parallel)
