"""Bytes on the wire: what the collectives of this process send, counted where torch is asked for them.

Counted per rank by the ring convention, in which n ranks share the work and nobody sends more than it must (Patarasu
and Yuan 2009; NCCL's "bus bandwidth" uses the same factors):

    all_reduce      2 (n - 1) / n  x  the tensor
    all_gather        (n - 1) / n  x  what each rank ends up with
    reduce_scatter    (n - 1) / n  x  what each rank puts in
    all_to_all        (n - 1) / n  x  what each rank puts in
    broadcast, reduce (n - 1) / n  x  the tensor: the last rank of the chain passes nothing on
    gather, scatter   (n - 1) / n  x  one rank's part
    send              the tensor

Real algorithms may move more (trees) or less (reduction in the switch). A collective that a backend makes of others, or
of the host's own (gloo's barrier), is not seen. Nothing is read from a device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

MIB = 2**20
# Function of torch.distributed -> (kind, factor of (n - 1) / n, argument that holds what is counted).
_COLLECTIVES: dict[str, tuple[str, float, str]] = {
    "all_reduce": ("all_reduce", 2.0, "tensor"),
    "all_reduce_coalesced": ("all_reduce", 2.0, "tensors"),
    "all_gather": ("all_gather", 1.0, "tensor_list"),
    "all_gather_into_tensor": ("all_gather", 1.0, "output_tensor"),
    "_all_gather_base": ("all_gather", 1.0, "output_tensor"),
    "all_gather_coalesced": ("all_gather", 1.0, "output_tensor_lists"),
    "reduce_scatter": ("reduce_scatter", 1.0, "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", 1.0, "input"),
    "_reduce_scatter_base": ("reduce_scatter", 1.0, "input"),
    "all_to_all_single": ("all_to_all", 1.0, "input"),
    "all_to_all": ("all_to_all", 1.0, "input_tensor_list"),
    "broadcast": ("broadcast", 1.0, "tensor"),
    "reduce": ("reduce", 1.0, "tensor"),
    "gather": ("gather", 1.0, "tensor"),
    "scatter": ("scatter", 1.0, "tensor"),
}
_SENDS = {"send": "tensor", "isend": "tensor"}
KINDS = tuple(sorted({kind for kind, *_ in _COLLECTIVES.values()} | {"send"}))


class WireMeter:
    """Counts bytes between `install` and `remove`. One at a time in a process, installed before others take hold of
    torch's functions (DeepSpeed keeps some of them).

    sent: kind -> bytes since `read` was last called; calls: kind -> number of calls.
    """

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._originals: list[tuple[Any, str, Callable]] = []
        self._depth = 0

    def install(self) -> WireMeter:
        for name in (*_COLLECTIVES, *_SENDS):
            if (original := getattr(distributed_c10d, name, None)) is not None:
                counted = self._counted(name, original)
                for module in (dist, distributed_c10d):
                    if getattr(module, name, None) is original:
                        self._originals.append((module, name, original))
                        setattr(module, name, counted)
        return self

    def remove(self) -> None:
        for module, name, original in self._originals:
            setattr(module, name, original)
        self._originals.clear()

    def read(self) -> dict[str, float]:
        """Kind -> bytes sent by this rank since the last reading."""
        sent, self.sent, self.calls = self.sent, {}, {}
        return sent

    def _counted(self, name: str, original: Callable) -> Callable:
        kind, factor, argument = _COLLECTIVES.get(name, ("send", 0.0, _SENDS.get(name, "")))
        names = list(inspect.signature(original).parameters)
        place, group_place = names.index(argument), names.index("group")

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:  # some are made of others
                what = args[place] if place < len(args) else kwargs.get(argument)
                group = args[group_place] if group_place < len(args) else kwargs.get("group")
                self._add(kind, factor, what, group)
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return counted

    def _add(self, kind: str, factor: float, what: Any, group: Any) -> None:
        ranks = dist.get_world_size(group)
        if ranks < 1:  # not in the group
            return
        share = factor * (ranks - 1) / ranks if factor else 1.0
        self.sent[kind] = self.sent.get(kind, 0.0) + share * _bytes_of(what)
        self.calls[kind] = self.calls.get(kind, 0) + 1


@functools.cache
def wire_meter() -> WireMeter:
    """The meter of this process, installed when it is first asked for."""
    return WireMeter().install()


def _bytes_of(what: Tensor | Sequence[Any] | None) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(what, Tensor):
        return what.numel() * what.element_size()
    return sum(_bytes_of(part) for part in what) if isinstance(what, Iterable) else 0
