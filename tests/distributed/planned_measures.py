"""What a rank really holds and sends, counted from outside: live tensors, and torch's own collectives."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trichord.config.run import RunConfig
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import build_engine, start_process_group
from trichord.engine.features import SlotLayout
from trichord.engine.sequence import data_place
from trichord.engine.step import Stepper
from trichord.layers.constants import HostConstant

COUNTS = {"samples": 0.0, "bad_samples": 0.0, "filtered": 0.0, "stop": 0.0}


KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "reduce_": "reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}


class Wire(TorchDispatchMode):
    """Adds up the bytes of the whole tensor that each collective is about (of an all-to-all, what a rank puts in), by
    kind, whoever calls it; and by the name of the group that it is between, too."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.by_group: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.split("::")[1], func._schema.name)
            sizes = [_size(arg) for arg in args[:2]]  # output and input, or the one that is both
            size = sizes[1] if kind == "all_to_all" else max(sizes)
            self.bytes[kind] += size
            self.by_group[_group_of(args), kind] += size
        return func(*args, **(kwargs or {}))


def _group_of(args: tuple) -> str:
    found = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    return dist.ProcessGroup.unbox(found).group_name


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def live_storages() -> dict[int, int]:
    """Address -> bytes of the memory of every tensor that Python can see, gradients included; each memory once."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor) and not o.is_meta]
        for tensor in tensors + [t.grad for t in tensors if t.grad is not None]:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def _not_states(batches: list[Any]) -> set[int]:
    """Memory of the data and of fixed numbers, which are no model states."""
    tensors = [value for batch in batches for value in vars(batch).values() if isinstance(value, Tensor)]
    tensors += [o._host for o in gc.get_objects() if isinstance(o, HostConstant)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@dataclasses.dataclass
class Measured:
    """states: bytes of live tensors as the update of a step begins; buckets: bytes of reduce buckets among what lives
    then (left out of states); wire: kind of collective -> bytes, in that step; in_node: of these, weights
    gathered from hpZ's second copy."""

    states: int
    buckets: int
    wire: dict[str, int]
    in_node: int


def kept_bytes(config: RunConfig, model: torch.nn.Module, batches: list[Any], autocast: bool = False) -> float:
    """Memory that autograd keeps for the backward pass, parameters left out, a mean over batches."""
    engine = config.engine
    model.train()
    model.enable_activation_checkpointing(engine.activation_checkpointing, engine.checkpoint_every_blocks)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0
    for batch in batches:
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model(batch)
        total += sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
    return total / len(batches)


def hpz_group_name() -> str:
    from deepspeed.utils.groups import _get_zero_param_intra_parallel_group

    return _get_zero_param_intra_parallel_group().group_name


def measure_step(config: RunConfig, model: torch.nn.Module, batches: list[Any], bucket_elements: int) -> Measured:
    """The second step of a run: optimizer states exist then, and ZeRO-3 knows the order of modules. Batches are whole;
    where the config has ranks share them, each takes its part."""
    before = set(live_storages()) - {p.untyped_storage().data_ptr() for p in model.parameters()}
    facts, device = start_process_group(config.engine.timeout_s)
    place = data_place(config.engine, facts)
    batches = [batch.shared(place.place, place.size) for batch in batches]
    prepare_blocks(model, config.engine)
    engine = build_engine(model, config.engine, micro_rows=config.batches.micro_rows, grad_accum_steps=len(batches))
    samples = config.batches.micro_rows * config.batches.max_samples_per_row
    layout = SlotLayout.of(samples, place.size, len(batches))
    stepper = Stepper(engine, config.objectives, device=device, layout=layout, max_grad_norm=1.0)
    del model
    stepper.run(batches, dict(COUNTS))
    found: dict[int, int] = {}
    update = stepper._update

    def look_then_update():
        found.update(live_storages())
        return update()

    stepper._update = look_then_update
    wire = Wire()
    with wire:
        stepper.run(batches, dict(COUNTS))
    ignored = before | _not_states(batches)
    sizes = [size for address, size in found.items() if address not in ignored]
    buckets = sum(size for size in sizes if size >= 2 * bucket_elements)
    in_node = wire.by_group[hpz_group_name(), "all_gather"] if config.engine.hpz_ranks > 1 else 0
    engine.destroy()
    return Measured(sum(sizes) - buckets, buckets, dict(wire.bytes), in_node)
