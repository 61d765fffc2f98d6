"""Small agreements between ranks: one decides, all know; one fails, all fail alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from trichord.core.errors import TrichordError

T = TypeVar("T")


def decide_on_rank_0(decide: Callable[[], T]) -> T:
    """Run `decide` on rank 0 and give its result to all ranks.

    Raises:
        TrichordError: what `decide` raised, on every rank, so that no rank waits for one that has given up.
    """
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = decide()
        except TrichordError as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def gather_lists(own: list[T]) -> list[T]:
    """The items of all ranks in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]
