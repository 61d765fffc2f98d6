"""Where DeepSpeed keeps the fp32 masters that the optimizer updates, by ZeRO stage; no other file knows.

A *master* is one flat tensor that the torch optimizer takes for a parameter: at stage 0 a parameter of the model,
at stages 1 and 2 this rank's partition of an optimizer group, at stage 3 of a sub-group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a parameter lies: elements [start, start + numel) of the flattened parameter are
    elements [offset, offset + numel) of master number `master`."""

    master: int
    offset: int
    start: int
    numel: int


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer of the config, which DeepSpeed wraps from stage 1 on."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def masters(engine: Any) -> list[Tensor]:
    """This rank's masters; under them the torch optimizer keeps its states."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def learned_parameters(engine: Any) -> list[tuple[int, str, list[nn.Parameter]]]:
    """(number of the first master, name of the optimizer group, parameters) of what the masters hold, in their order.

    At stage 0 every parameter is a master; from stage 1 on all of a list lie in the same one.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        names = [optimizer.optimizer.param_groups[i]["name"] for i in optimizer.sub_group_to_group_id.values()]
        return [(number, name, params) for number, (name, params) in enumerate(zip(names, optimizer.fp16_groups))]
    names = [group["name"] for group in optimizer.param_groups]
    if stage:
        return [(number, name, params) for number, (name, params) in enumerate(zip(names, optimizer.bit16_groups))]
    found, first = [], 0
    for group in optimizer.param_groups:
        found.append((first, group["name"], group["params"]))
        first += len(group["params"])
    return found


def places(engine: Any) -> dict[int, Place]:
    """id of each parameter that learns -> this rank's part of it; of none that lies on other ranks altogether."""
    return {id(parameter): place for parameter, place in _places(engine) if place.numel}


def _places(engine: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    for number, _, parameters in learned_parameters(engine):
        for i, parameter in enumerate(parameters):
            if stage == 0:
                yield parameter, Place(number + i, 0, 0, parameter.numel())
            elif stage == 3:
                _, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
                yield parameter, Place(number, offset, *partition(parameter, padded))
            elif (mapping := parameter._hp_mapping) is not None:  # else another rank's partition holds it
                address = mapping.hp_fragment_address
                yield parameter, Place(number, address.start, mapping.lp_fragment_address.start, address.numel)


def partition(parameter: nn.Parameter, padded: int) -> tuple[int, int]:
    """Start and unpadded length of this rank's ZeRO-3 partition; the last ranks may hold padding only."""
    start = min(dist.get_rank() * padded, parameter.ds_numel)
    return start, min(padded, parameter.ds_numel - start)


def owners(engine: Any) -> Iterator[tuple[int, nn.Parameter, list[tuple[int, int, int]]]]:
    """(number of the master, parameter, its pieces) of every parameter that learns. Pieces are (rank, start, numel) of
    the flattened parameter, none of them empty; at stage 0 this rank's own, as every rank holds all."""
    stage, optimizer, world_size = engine.zero_optimization_stage(), engine.optimizer, dist.get_world_size()
    for number, _, parameters in learned_parameters(engine):
        if stage == 0:
            yield from ((number + i, p, [(dist.get_rank(), 0, p.numel())]) for i, p in enumerate(parameters))
        elif stage == 3:
            for parameter in parameters:
                yield number, parameter, _cut(0, parameter.ds_numel, parameter.ds_tensor.ds_numel, world_size)
        else:
            offsets = zip(optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number])
            for parameter, offset in offsets:
                yield number, parameter, _cut(offset, parameter.numel(), optimizer.partition_size[number], world_size)


def _cut(offset: int, numel: int, partition_size: int, world_size: int) -> list[tuple[int, int, int]]:
    """Pieces of a parameter whose elements begin at `offset` of ranges of `partition_size`, one for each rank."""
    pieces = []
    for rank in range(world_size):
        low = max(offset, rank * partition_size)
        high = min(offset + numel, (rank + 1) * partition_size)
        if low < high:
            pieces.append((rank, low - offset, high - low))
    return pieces
