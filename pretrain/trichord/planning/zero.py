"""What DeepSpeed does with a run's parameters, as numbers: which sizes it partitions, buffers, gathers and keeps.

Read from the JSON that training hands to DeepSpeed, the user's overlay included; keys that are not in it have
DeepSpeed's own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trichord.engine.config import EngineConfig
from trichord.engine.deepspeed_config import deepspeed_config
from trichord.engine.param_groups import fused_matrices
from trichord.fusion.model import param_room
from trichord.layers.blocks import block_lists
from trichord.planning.recomputation import moves_again

# deepspeed/runtime/zero/config.py; a test compares.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": None,
    "use_multi_rank_bucket_allreduce": True,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter: elements; owners: modules that hold it (2 for tied weights); is_matrix: two or more axes, so it is
    in a group that decays; is_hidden: a matrix that the Muon optimizer takes; in_linear: of a torch.nn.Linear, whose
    gradient travels in bfloat16 under autocast; recomputed: activation checkpointing runs what it is for again."""

    room: str
    numel: int
    trainable: bool
    owners: int
    is_matrix: bool
    is_hidden: bool
    in_linear: bool
    recomputed: bool = False


def parameters_of(model: nn.Module) -> list[Parameter]:
    """All parameters of a `Trichord`, tied ones once; any device."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    # The class itself, as DeepSpeed asks for it: subclasses such as the loss head stay in fp32.
    linear = {id(p) for m in model.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)}
    again = {id(p) for blocks in block_lists(model) for block in blocks for p in _recomputed(block)}
    return [
        Parameter(
            room=param_room(name),
            numel=p.numel(),
            trainable=p.requires_grad,
            owners=owners[id(p)],
            is_matrix=p.dim() >= 2,
            is_hidden=fused_matrices(name, p) > 0,
            in_linear=id(p) in linear,
            recomputed=id(p) in again,
        )
        for name, p in model.named_parameters()
    ]


def _recomputed(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block without those of its last linear map: torch stops where it has what it needs."""
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    last = {id(p) for p in linear[-1].parameters()} if linear else set()
    return [p for p in block.parameters() if id(p) not in last and p.requires_grad]


@dataclass(frozen=True)
class Zero:
    """ZeRO of a run on `ranks` ranks. weight_bytes: of an element of weights and gradients; bucket, live, reuse,
    prefetch, persistence: elements, as DeepSpeed's keys of those names; overlap: gradients are reduced during the
    backward pass; recomputed: share of the blocks that activation checkpointing runs again; hpz: ranks over which a
    second copy of the weights lies; muon: its matrices are a group of the optimizer of their own."""

    stage: int
    ranks: int
    weight_bytes: int
    autocast: bool
    bucket: int
    overlap: bool
    whole_bucket_all_reduce: bool
    live: int
    reuse: int
    prefetch: int
    persistence: int
    recomputed: float = 0.0
    hpz: int = 1
    muon: bool = False

    @classmethod
    def of(cls, engine: EngineConfig, ranks: int, num_parameters: int | None = None) -> Zero:
        """num_parameters: trainable ones, by which messages are sized.

        Raises:
            ConfigError: the overlay conflicts with the typed config.
        """
        found: dict[str, Any] = deepspeed_config(
            engine, micro_rows=1, grad_accum_steps=1, num_parameters=num_parameters
        )["zero_optimization"]
        zero = DEFAULTS | {key: value for key, value in found.items() if value != "auto"}
        overlap = zero["overlap_comm"] if zero["overlap_comm"] is not None else engine.zero_stage == 3
        return cls(
            stage=engine.zero_stage,
            ranks=ranks,
            weight_bytes=2 if engine.precision in ("bf16", "fp16") else 4,
            autocast=engine.precision == "autocast_bf16",
            bucket=int(zero["reduce_bucket_size"]),
            overlap=bool(overlap),
            whole_bucket_all_reduce=bool(zero["use_multi_rank_bucket_allreduce"]),
            live=int(zero["stage3_max_live_parameters"]),
            reuse=int(zero["stage3_max_reuse_distance"]),
            prefetch=int(zero["stage3_prefetch_bucket_size"]),
            persistence=int(zero["stage3_param_persistence_threshold"]),
            recomputed=moves_again(engine),
            hpz=engine.hpz_ranks,
            muon=engine.optimizer == "muon",
        )

    def groups(self, parameters: Iterable[Parameter]) -> list[list[Parameter]]:
        """What learns, by group of the optimizer, in its order: Muon's matrices, matrices, vectors; none is empty."""
        groups: dict[int, list[Parameter]] = {0: [], 1: [], 2: []}
        for p in parameters:
            if p.trainable:
                groups[0 if self.muon and p.is_hidden else 1 if p.is_matrix else 2].append(p)
        return [group for group in groups.values() if group]

    def own(self, parameters: Iterable[Parameter]) -> int:
        """Elements of a rank's partition of them; all of them at stage 0."""
        if self.stage == 0:
            return sum(p.numel for p in parameters)
        if self.stage == 3:  # every parameter on its own, rounded up
            return sum(-(-p.numel // self.ranks) for p in parameters)
        return -(-sum(p.numel for p in parameters) // self.ranks)

    def gradient_elements(self, trainable: Sequence[Parameter], rank: int | None = None) -> int:
        """Elements of reduced gradients that a rank holds as the update begins; rank None: the one with the most.

        At stages 1 and 2 the parameters of a group lie end to end, and a rank keeps the whole gradient of every one
        that its part of the line touches.
        """
        if self.stage in (0, 3):
            return self.own(trainable)
        touched = np.zeros(self.ranks + 1, dtype=np.int64)
        for group in self.groups(trainable):
            sizes = np.array([p.numel for p in group], dtype=np.int64)
            part = max(1, -(-int(sizes.sum()) // self.ranks))
            ends = np.cumsum(sizes)
            np.add.at(touched, (ends - sizes) // part, sizes)
            np.add.at(touched, (ends - 1) // part + 1, -sizes)
        held = np.cumsum(touched[:-1])
        return int(held.max() if rank is None else held[rank])

    def persistent(self, parameters: Sequence[Parameter]) -> int:
        """Elements that stage 3 keeps whole on every rank beside its partition: those of small parameters."""
        return sum(p.numel for p in parameters if p.numel < self.persistence) if self.stage == 3 else 0

    def second_copy(self, parameters: Sequence[Parameter]) -> int:
        """Elements of the second copy of the weights that hpZ keeps: of all but small ones."""
        if self.hpz == 1:
            return 0
        return sum(-(-p.numel // self.hpz) for p in parameters if p.numel >= self.persistence)

    def gradient_bytes(self, parameters: Iterable[Parameter]) -> int:
        """Bytes of the gradients of all trainable ones, as they travel."""
        return sum(self.travelling_bytes(p) for p in parameters if p.trainable)

    def travelling_bytes(self, parameter: Parameter) -> int:
        """Bytes of one parameter, or of its gradient, in a collective: what linear layers own travels in bfloat16 under
        autocast, from stage 1 on."""
        return parameter.numel * (2 if self.autocast and self.stage and parameter.in_linear else self.weight_bytes)

    @property
    def bucket_bytes(self) -> int:
        """Bytes of one reduce bucket; under autocast there is one for each of the two dtypes of gradients."""
        return self.bucket * (self.weight_bytes + 2 * self.autocast)
