"""Matrices whose elements lie on several ranks: brought together on one of them, worked on, and handed back.

ZeRO deals the elements of a group without regard to where a matrix begins. Stages 1 and 2 cut the flattened group into
one range per rank, so that a rank shares at most its first and its last matrix with others; stage 3 cuts every matrix
into one range per rank. Each matrix has one *worker*, the rank that computes with the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trichord.engine.masters import masters, owners, places


@dataclass(frozen=True)
class Matrix:
    """shape: of the whole, (parts, rows, columns), where a fused projection has several parts; pieces: (rank, start,
    numel) of the flattened matrix, in order; offset: of this rank's piece in its master; worker: a rank."""

    shape: tuple[int, int, int]
    pieces: tuple[tuple[int, int, int], ...]
    offset: int
    worker: int

    def length_on(self, rank: int) -> int:
        """Elements that lie on a rank."""
        return sum(numel for owner, _, numel in self.pieces if owner == rank)


# Matrices that are worked on together: one that lies on one rank, or as many shared ones as there are ranks, so that no
# rank holds many of them whole.
Round = tuple[Matrix, ...]


def matrix_rounds(engine: Any, parts_of: Callable[[nn.Parameter], int]) -> dict[int, list[Round]]:
    """id of each master that holds matrices -> its matrices in rounds. parts_of: how many a parameter holds, or 0.

    What ranks share comes first: a rank that waited for others between matrices of its own would wait for their work.
    """
    own, live = places(engine), masters(engine)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared: dict[int, list[Matrix]] = {}
    alone: dict[int, list[Matrix]] = {}
    for number, parameter, pieces in owners(engine):
        parts = parts_of(parameter)
        if not parts:
            continue
        master, place = id(live[number]), own.get(id(parameter))
        in_turn = pieces[len(shared.setdefault(master, [])) % len(pieces)][0]
        rows, columns = getattr(parameter, "ds_shape", parameter.shape)
        matrix = Matrix((parts, rows // parts, columns), tuple(pieces), place.offset if place else 0, in_turn)
        if len(pieces) > 1:
            shared[master].append(matrix)
        elif in_turn == rank:
            alone.setdefault(master, []).append(matrix)
    return {
        master: [tuple(matrices[i : i + world_size]) for i in range(0, len(matrices), world_size)]
        + [(matrix,) for matrix in alone.get(master, ())]
        for master, matrices in shared.items()
    }


def work_on(round_: Round, values: Tensor, device: torch.device, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`work` of each matrix of the round, made by its worker; returns this rank's piece of each result, in order.

    All ranks call it together. values: flat, this rank's part of what the matrices are made of, laid out as its master;
    work: (parts, rows, columns) -> the same, on `device`, where messages between ranks are sent from, too.
    """
    rank = dist.get_rank()
    own = [values.narrow(0, m.offset, m.length_on(rank)).to(device) for m in round_]
    if len(round_[0].pieces) == 1:
        return [work(own[0].view(round_[0].shape)).reshape(-1)]
    whole = _gather(round_, own)
    return _scatter(round_, {i: work(flat.view(round_[i].shape)).reshape(-1) for i, flat in whole.items()}, own[0])


def _gather(matrices: Round, own: Sequence[Tensor]) -> dict[int, Tensor]:
    """Number in the round -> flat matrix, of those that this rank works on."""
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    sends = [[piece for matrix, piece in zip(matrices, own) if matrix.worker == to] for to in ranks]
    mine = [(number, matrix) for number, matrix in enumerate(matrices) if matrix.worker == rank]
    lengths = [[matrix.length_on(owner) for _, matrix in mine] for owner in ranks]
    received = _all_to_all(sends, lengths, own[0])
    return {
        number: torch.cat([received[owner][i] for owner, _, _ in matrix.pieces])
        for i, (number, matrix) in enumerate(mine)
    }


def _scatter(matrices: Round, done: dict[int, Tensor], like: Tensor) -> list[Tensor]:
    """This rank's piece of each matrix, from its worker. done: by number in the round."""
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    sends: list[list[Tensor]] = [[] for _ in ranks]
    for number, flat in done.items():
        for owner, start, numel in matrices[number].pieces:
            sends[owner].append(flat.narrow(0, start, numel))
    lengths = [[matrix.length_on(rank) for matrix in matrices if matrix.worker == worker] for worker in ranks]
    received = [iter(tensors) for tensors in _all_to_all(sends, lengths, like)]
    return [next(received[matrix.worker]) for matrix in matrices]


def _all_to_all(
    sends: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]], like: Tensor
) -> list[list[Tensor]]:
    """sends: tensors for each rank; lengths: of those that come from each. Returns what came from each, cut again."""
    out = torch.cat([like.new_empty(0), *(tensor for tensors in sends for tensor in tensors)])
    totals = [sum(numels) for numels in lengths]
    into = like.new_empty(sum(totals))
    dist.all_to_all_single(into, out, totals, [sum(t.numel() for t in tensors) for tensors in sends])
    return [list(part.split(list(numels))) for part, numels in zip(into.split(totals), lengths)]
