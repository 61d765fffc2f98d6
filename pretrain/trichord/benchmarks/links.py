"""What ranks are to each other: one all-reduce, bandwidth of each pair of nodes, clocks. On the nodes only.

    torchrun ... -m trichord.benchmarks.links OUT.json [--mib X]

NCCL where torch sees GPUs (this path has run on no GPU yet), else gloo. Rank 0 writes the file; the launcher's
preflight reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trichord.core.dist import rank_facts
from trichord.core.status import write_atomically

_TIMEOUT_S = 60.0
_GPU_MIB, _CPU_MIB = 64.0, 2.0
_REPEATS = 5
_PINGS = 8
Node = tuple[int, str]  # (rank of its first process, name)


@dataclass(frozen=True)
class Pair:
    """Two nodes, and what goes from one to the other while as much comes back, in gigabytes per second."""

    nodes: tuple[str, str]
    gb_per_s: float


class Ranks:
    """The process group and what is measured with it. control: gloo, for clocks and gathering."""

    def __init__(self, mib: float | None):
        self.rank, self.world_size = rank_facts().rank, rank_facts().world_size
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(rank_facts().local_rank)
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.backend = "nccl" if self.cuda else "gloo"
        dist.init_process_group(self.backend, timeout=timedelta(seconds=_TIMEOUT_S))
        self.control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=_TIMEOUT_S))
        self.bytes = int((mib or (_GPU_MIB if self.cuda else _CPU_MIB)) * 2**20)
        self.buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=self.device)

    def facts(self) -> list[dict[str, Any]]:
        """Of each rank, on all ranks: where it runs and what torch sees there."""
        own = {
            "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            "group": int(os.environ.get("GROUP_RANK", "0")),
            "torch": torch.__version__,
            "cuda_devices": torch.cuda.device_count() if self.cuda else 0,
        }
        return self._gather(own)

    def all_reduce(self) -> dict[str, Any]:
        """Bus bandwidth (a rank moves 2 (n - 1) / n of the buffer) of the slowest rank, whether the sum is right."""
        expected = self.world_size * (self.world_size + 1) / 2
        self.buffer.fill_(self.rank + 1)
        dist.all_reduce(self.buffer)
        right = bool((self.buffer == expected).all())
        self.buffer.zero_()
        seconds = max(self._gather(self._timed(lambda: dist.all_reduce(self.buffer))))
        moved = 2 * (self.world_size - 1) / self.world_size * self.bytes
        return {"right": all(self._gather(right)), "gb_per_s": moved / seconds / 1e9, "bytes": self.bytes}

    def pairs(self, nodes: Sequence[Node]) -> list[Pair]:
        """Both ways at once between the first ranks of two nodes; pairs of one round are disjoint and run together."""
        found: list[Pair] = []
        for pairs in rounds(nodes):
            own = next((pair for pair in pairs if self.rank in (pair[0][0], pair[1][0])), None)
            dist.barrier(group=self.control)
            if own is not None:
                peer = next(rank for rank, _ in own if rank != self.rank)
                seconds = self._timed(lambda peer=peer: self._exchange(peer))
                if self.rank == own[0][0]:
                    found.append(Pair((own[0][1], own[1][1]), self.bytes / seconds / 1e9))
        return [pair for part in self._gather(found) for pair in part]

    def clocks(self, nodes: Sequence[Node]) -> dict[str, float]:
        """Seconds by which each node's clock is ahead of the first one's: what it says halfway through the quickest of
        some round trips (Cristian 1989)."""
        offsets = {nodes[0][1]: 0.0}
        for rank, name in nodes[1:]:
            if self.rank == nodes[0][0]:
                offsets[name] = min(self._ping(rank) for _ in range(_PINGS))[1]
            elif self.rank == rank:
                for _ in range(_PINGS):
                    self._answer(nodes[0][0])
        return offsets

    def _ping(self, rank: int) -> tuple[float, float]:
        """(seconds of the round trip, seconds by which the other is ahead)."""
        said = torch.zeros(1, dtype=torch.float64)
        began = time.time()
        dist.send(said, rank, group=self.control)
        dist.recv(said, rank, group=self.control)
        ended = time.time()
        return ended - began, float(said) - (began + ended) / 2

    def _answer(self, rank: int) -> None:
        said = torch.zeros(1, dtype=torch.float64)
        dist.recv(said, rank, group=self.control)
        dist.send(said.fill_(time.time()), rank, group=self.control)

    def _exchange(self, peer: int) -> None:
        incoming = torch.empty_like(self.buffer)
        operations = [dist.P2POp(dist.isend, self.buffer, peer), dist.P2POp(dist.irecv, incoming, peer)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    def _timed(self, work: Callable[[], Any]) -> float:
        """Median seconds; the first call opens connections and does not count."""
        seconds = []
        for _ in range(_REPEATS + 1):
            began = time.perf_counter()
            work()
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def _gather(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, own, group=self.control)
        return found


def rounds(nodes: Sequence[Node]) -> Iterator[list[tuple[Node, Node]]]:
    """Every pair once, in rounds of disjoint pairs: the circle method of round-robin tournaments."""
    seats: list[Node | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]))
        yield [(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure(mib: float | None = None) -> dict[str, Any]:
    """All of it, on all ranks together; every rank gets the facts, rank 0 all pairs and clocks."""
    ranks = Ranks(mib)
    facts = ranks.facts()
    first: dict[int, Node] = {}
    for rank, fact in enumerate(facts):
        first.setdefault(fact["group"], (rank, fact["node"]))
    nodes = [first[group] for group in sorted(first)]
    found = {
        "backend": ranks.backend,
        "ranks": facts,
        "all_reduce": ranks.all_reduce(),
        "pairs": [asdict(pair) for pair in ranks.pairs(nodes)],
        "clock_ahead_s": ranks.clocks(nodes),
    }
    dist.barrier(group=ranks.control)
    dist.destroy_process_group()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write it down on rank 0."""
    parser = argparse.ArgumentParser(description="All-reduce, bandwidth between nodes, clocks.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--mib", type=float, help="Size of the messages. Default: 64 on GPUs, 2 on CPUs.")
    asked = parser.parse_args(argv)
    found = measure(asked.mib)
    if rank_facts().rank == 0:
        write_atomically(asked.out, json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
