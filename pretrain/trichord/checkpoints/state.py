"""Which part of the training state a rank owns, as views on DeepSpeed's live tensors.

For every parameter, the owner of a range of its flattened fp32 master weights also owns the same range of every
optimizer state and of the average of weights. Where masters lie is known to `engine.masters`. Running statistics,
which every rank holds, are stored like frozen parameters, whole and by rank 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from trichord.engine.ema import AVERAGE
from trichord.engine.masters import Place, learned_parameters, masters, partition, places, torch_optimizer
from trichord.engine.optimizers import empty_state, pack_state, state_tensors
from trichord.layers.stored import stored_buffers

WEIGHT = "param"


@dataclass(frozen=True)
class OwnedSlice:
    """A contiguous range of one flattened parameter and of its optimizer states.

    name, shape: of the whole parameter; group: name of its optimizer group, None if frozen;
    start, numel: the range; tensors: kind -> (numel,) view on the live state. Kind `param` is the fp32 master (or the
    parameter itself where there is none), `ema` its average, the others are the optimizer's own names (`exp_avg`).
    """

    name: str
    shape: tuple[int, ...]
    group: str | None
    start: int
    numel: int
    tensors: dict[str, Tensor]


def slices_to_save(engine: Any) -> list[OwnedSlice]:
    """This rank's part of the state: over all ranks, every element exactly once."""
    return [piece for piece in _live_slices(engine, whole=False) if piece.numel]


def slices_to_fill(engine: Any) -> list[OwnedSlice]:
    """Everything this rank has to hold: under stages 0 to 2 frozen (and at 0 all) parameters are whole on each rank."""
    return [piece for piece in _live_slices(engine, whole=True) if piece.numel]


def optimizer_step(engine: Any) -> int:
    """Updates applied so far by the optimizer (Adam's `step`); 0 before the first, 1 for ever after for SGD, which does
    not count them."""
    states = [torch_optimizer(engine).state.get(master) for master in masters(engine)]
    return max((int(state.get("step", 1)) for state in states if state), default=0)


def create_optimizer_state(engine: Any, kinds: Mapping[str, Collection[str]], step: int) -> None:
    """Make zero-filled optimizer states as they would exist after `step` updates. kinds: of each parameter, by name."""
    optimizer, live, stage = torch_optimizer(engine), masters(engine), engine.zero_optimization_stage()
    names = {id(parameter): name for name, parameter in named_parameters(engine)}
    of_master: dict[int, set[str]] = {}
    for first, _, parameters in learned_parameters(engine):
        for i, parameter in enumerate(parameters):
            stored = set(kinds.get(names[id(parameter)], ())) - {WEIGHT, AVERAGE}
            of_master.setdefault(first + i if stage == 0 else first, set()).update(stored)
    for number, stored in of_master.items():
        if state := empty_state(optimizer, live[number], sorted(stored), step):
            optimizer.state[live[number]] = state


def pack_optimizer_state(engine: Any) -> None:
    """After states were created and filled: as the optimizer keeps them."""
    optimizer = torch_optimizer(engine)
    for master in masters(engine):
        if optimizer.state.get(master):
            pack_state(optimizer, master)


def refresh_parameters(engine: Any) -> None:
    """After the masters were filled: bring the (low precision) parameters that the model computes with up to date."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


def group_hyperparameters(engine: Any) -> list[dict[str, Any]]:
    """Name, lr, weight decay and the like of every optimizer group, without its tensors."""
    keep = ("name", "lr", "weight_decay", "betas", "eps")
    return [{key: group[key] for key in keep if key in group} for group in engine.optimizer.param_groups]


def named_parameters(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the model's own names; tied ones once."""
    yield from engine.module.model.named_parameters()


def named_buffers(engine: Any) -> dict[str, Tensor]:
    """What a checkpoint holds besides parameters, equal on all ranks, under the model's own names."""
    return stored_buffers(engine.module.model)


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _live_slices(engine: Any, whole: bool) -> Iterator[OwnedSlice]:
    stage, places_of = engine.zero_optimization_stage(), places(engine)
    live = [_tensors(engine, number, master) for number, master in enumerate(masters(engine))]
    groups = {id(p): name for _, name, parameters in learned_parameters(engine) for p in parameters}
    for name, parameter in named_parameters(engine):
        group, place = groups.get(id(parameter)), places_of.get(id(parameter))
        if group is None:
            start, tensors = _frozen(parameter, stage, whole)
        elif place is None:  # it lies on other ranks
            start, tensors = 0, {}
        else:
            start, tensors = _learned(live[place.master], place, stage, whole)
        numel = tensors[WEIGHT].numel() if tensors else 0
        yield OwnedSlice(name, parameter_shape(parameter), group, start, numel, tensors)
    if whole or dist.get_rank() == 0:
        for name, buffer in named_buffers(engine).items():
            yield OwnedSlice(name, tuple(buffer.shape), None, 0, buffer.numel(), {WEIGHT: buffer.view(-1)})


def _tensors(engine: Any, number: int, master: Tensor) -> dict[str, Tensor]:
    """Kind -> flat tensor of a master's length."""
    found = {WEIGHT: master.data.view(-1), **state_tensors(torch_optimizer(engine), master)}
    if engine.weight_average is not None:
        found[AVERAGE] = engine.weight_average.tensors[number].view(-1)
    return found


def _learned(live: dict[str, Tensor], place: Place, stage: int, whole: bool) -> tuple[int, dict[str, Tensor]]:
    """At stage 0 every rank holds all of it, and writes its share."""
    low, high = _share(place.numel, whole) if stage == 0 else (0, place.numel)
    return place.start + low, {kind: t.narrow(0, place.offset + low, high - low) for kind, t in live.items()}


def _share(numel: int, whole: bool) -> tuple[int, int]:
    """Range of a replicated tensor that this rank writes (or, whole, reads)."""
    if whole:
        return 0, numel
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return numel * rank // world_size, numel * (rank + 1) // world_size


def _frozen(parameter: nn.Parameter, stage: int, whole: bool) -> tuple[int, dict[str, Tensor]]:
    if stage == 3:
        start, numel = partition(parameter, parameter.ds_tensor.ds_numel)
        return start, {WEIGHT: parameter.ds_tensor.data.view(-1)[:numel]}
    start, end = _share(parameter.numel(), whole)
    return start, {WEIGHT: parameter.data.view(-1)[start:end]}
