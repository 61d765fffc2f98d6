"""All ranks launch with rank 0's tiles: a node with another copy of the tables would round differently."""

from __future__ import annotations

import json
from dataclasses import astuple

import torch
import torch.distributed as dist

from trichord_kernels.errors import KernelError
from trichord_kernels.tables.collect import Table, all_tables
from trichord_kernels.tables.tile import Tile


def agree_on_tables(group: dist.ProcessGroup | None = None, tables: dict[str, Table] | None = None) -> list[str]:
    """Replace the entries of every tile table by those of the group's first rank, in place; call it on all its ranks.

    Returns the names of the tables that differed here. The tables travel as JSON text in a tensor, on the device that
    the group's backend takes. `tables` stands in for `all_tables()`.

    Raises:
        KernelError: a table of the first rank does not exist here, or another one does: the ranks run different code.
    """
    mine = all_tables() if tables is None else tables
    chosen = tables_from_json(_broadcast_text(tables_to_json(mine), group))
    if chosen.keys() != mine.keys():
        raise KernelError(
            f"tile tables: expected those of the first rank, {', '.join(sorted(chosen))}, got "
            f"{', '.join(sorted(mine))}; install one version of trichord_kernels on all ranks"
        )
    differing = [name for name, table in mine.items() if table != chosen[name]]
    for name in differing:
        mine[name].clear()
        mine[name].update(chosen[name])
    return differing


def tables_to_json(tables: dict[str, Table]) -> str:
    """As {table: [[key, tile], ...]}; a key is a list of words and whole numbers, a tile its fields in order."""
    return json.dumps(
        {name: [[list(key), astuple(tile)] for key, tile in table.items()] for name, table in tables.items()}
    )


def tables_from_json(text: str) -> dict[str, Table]:
    return {name: {tuple(key): Tile(*tile) for key, tile in entries} for name, entries in json.loads(text).items()}


def _broadcast_text(text: str, group: dist.ProcessGroup | None) -> str:
    """The first rank's text, on every rank."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    source = dist.get_global_rank(group, 0) if group is not None else 0
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, source, group=group)
    if dist.get_rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return bytes(data.tolist()).decode()
