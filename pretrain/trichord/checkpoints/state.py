"""Which part of the training state a rank owns, as views on DeepSpeed's live tensors.

For every parameter, the owner of a range of its flattened fp32 master weights also owns the same range of every
optimizer state. Where those tensors are depends on the ZeRO stage and on nothing else; this file is the only one that
knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WEIGHT = "param"


@dataclass(frozen=True)
class OwnedSlice:
    """A contiguous range of one flattened parameter and of its optimizer states.

    name, shape: of the whole parameter; group: name of its optimizer group, None if frozen;
    start, numel: the range; tensors: kind -> (numel,) view on the live state. Kind `param` is the fp32 master (or the
    parameter itself where there is none), the others are the optimizer's own names (`exp_avg`, `exp_avg_sq`).
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
    for holder in _state_holders(engine):
        state = _torch_optimizer(engine).state.get(holder)
        if state:
            return int(state.get("step", 1))
    return 0


def create_optimizer_state(engine: Any, kinds: list[str], step: int) -> None:
    """Make zero-filled optimizer states of these kinds, as they would exist after `step` updates."""
    optimizer = _torch_optimizer(engine)
    for holder in _state_holders(engine):
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        device = holder.device if on_device else torch.device("cpu")
        state: dict[str, Tensor] = {kind: torch.zeros_like(holder.data) for kind in kinds}
        if not isinstance(optimizer, torch.optim.SGD):  # which counts no updates
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        optimizer.state[holder] = state


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


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _live_slices(engine: Any, whole: bool) -> Iterator[OwnedSlice]:
    stage = engine.zero_optimization_stage()
    groups = _group_names(engine)
    for name, parameter in named_parameters(engine):
        group = groups.get(id(parameter))
        if group is None:
            start, tensors = _frozen(parameter, stage, whole)
        elif stage == 0:
            start, tensors = _stage_0(engine, parameter, whole)
        elif stage == 3:
            start, tensors = _stage_3(engine, parameter)
        else:
            start, tensors = _stage_1_2(engine, parameter)
        numel = tensors[WEIGHT].numel() if tensors else 0
        yield OwnedSlice(name, parameter_shape(parameter), group, start, numel, tensors)


def _group_names(engine: Any) -> dict[int, str]:
    """id of each trainable parameter -> name of its optimizer group."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        members = [(group["name"], group["params"]) for group in optimizer.param_groups]
    elif stage == 3:
        names = [optimizer.optimizer.param_groups[i]["name"] for i in optimizer.sub_group_to_group_id.values()]
        members = list(zip(names, optimizer.fp16_groups))
    else:
        members = [(group["name"], params) for group, params in zip(optimizer.param_groups, optimizer.bit16_groups)]
    return {id(parameter): name for name, params in members for parameter in params}


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _state_holders(engine: Any) -> list[Tensor]:
    """The tensors under which the torch optimizer keeps its states."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def _states(engine: Any, holder: Tensor) -> dict[str, Tensor]:
    """Kind -> state tensor of the holder's size; `step` and other scalars are left out."""
    state = _torch_optimizer(engine).state.get(holder, {})
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() == holder.numel() and k != "step"}


def _share(numel: int, whole: bool) -> tuple[int, int]:
    """Range of a replicated tensor that this rank writes (or, whole, reads)."""
    if whole:
        return 0, numel
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return numel * rank // world_size, numel * (rank + 1) // world_size


def _stage_0(engine: Any, parameter: nn.Parameter, whole: bool) -> tuple[int, dict[str, Tensor]]:
    start, end = _share(parameter.numel(), whole)
    tensors = {WEIGHT: parameter.data, **_states(engine, parameter)}
    return start, {kind: tensor.view(-1)[start:end] for kind, tensor in tensors.items()}


def _stage_1_2(engine: Any, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's partition holds it
        return 0, {}
    holder = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    tensors = {WEIGHT: holder.data, **_states(engine, holder)}
    return mapping.lp_fragment_address.start, {
        kind: tensor.narrow(0, address.start, address.numel) for kind, tensor in tensors.items()
    }


def _stage_3(engine: Any, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
    optimizer = engine.optimizer
    number, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    holder = optimizer.fp32_partitioned_groups_flat[number]
    start, numel = _partition(parameter, padded)
    tensors = {WEIGHT: holder.data, **_states(engine, holder)}
    return start, {kind: tensor.narrow(0, offset, numel) for kind, tensor in tensors.items()}


def _frozen(parameter: nn.Parameter, stage: int, whole: bool) -> tuple[int, dict[str, Tensor]]:
    if stage == 3:
        start, numel = _partition(parameter, parameter.ds_tensor.ds_numel)
        return start, {WEIGHT: parameter.ds_tensor.data.view(-1)[:numel]}
    start, end = _share(parameter.numel(), whole)
    return start, {WEIGHT: parameter.data.view(-1)[start:end]}


def _partition(parameter: nn.Parameter, padded: int) -> tuple[int, int]:
    """Start and unpadded length of this rank's ZeRO-3 partition; the last ranks may hold padding only."""
    start = min(dist.get_rank() * padded, parameter.ds_numel)
    return start, min(padded, parameter.ds_numel - start)
