"""Small agreements between ranks: one decides, all know; one fails, all fail alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from trichord.core.errors import TrichordError

T = TypeVar("T")

_LOOK_AGAIN = timedelta(seconds=60)
_decisions = itertools.count()


def decide_on_rank_0(decide: Callable[[], T]) -> T:
    """Run `decide` on rank 0 and give its result to all ranks, however long it takes: indexing or fetching may take
    longer than any collective should. A rank 0 that has died is for the watch, or torchrun, to see.

    Raises:
        TrichordError: what `decide` raised, on every rank, so that no rank waits for one that has given up.
    """
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = decide()
        except TrichordError as error:
            message[1] = error
    _wait_for_rank_0()
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def _wait_for_rank_0() -> None:
    store, key = dist.distributed_c10d._get_default_store(), f"trichord_decision_{next(_decisions)}"
    if dist.get_rank() == 0:
        store.set(key, "")
        return
    while True:
        try:
            return store.wait([key], _LOOK_AGAIN)
        except dist.DistNetworkError:  # the store itself is gone
            raise
        except dist.DistStoreError:
            continue


def gather_lists(own: list[T]) -> list[T]:
    """The items of all ranks in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]
