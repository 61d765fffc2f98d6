"""One way to lay a run out over GPUs, and whether it fits: memory of a GPU and of a node."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.layers.recompute import Recompute
from trichord.planning.gpus import Gpu
from trichord.planning.memory import GIB, ModelStates, checkpoint_bytes, model_states
from trichord.planning.rows import RowSplit
from trichord.planning.sharing import check_sharing
from trichord.planning.subject import Subject
from trichord.planning.zero import Zero
from trichord_kernels.tables.linear_cross_entropy import chunk_rows

# Assumptions, all printed with the plan.
CONTEXT_BYTES = round(1.5 * GIB)  # the driver's context, NCCL's buffers, cuBLAS workspaces
FRAGMENTATION_FRAC = 0.08  # of everything allocated: what the caching allocator holds and cannot use
PROCESS_BYTES = 3 * GIB  # of host memory: Python, torch and DeepSpeed, once per rank
WORKER_BYTES = 1 * GIB  # of host memory: a data worker, its libraries shared with its rank by fork


@dataclass(frozen=True)
class Layout:
    """The choices of a run that do not change what it learns. sharing: ranks that share rows."""

    zero_stage: int
    micro_rows: int
    offload: str
    checkpointing: Recompute
    sharing: int = 1

    @classmethod
    def of(cls, subject: Subject) -> Layout:
        engine = subject.config.engine
        return cls(
            engine.zero_stage,
            subject.config.batches.micro_rows,
            engine.offload,
            engine.activation_checkpointing,
            engine.sequence_parallel,
        )

    def engine(self, engine: EngineConfig) -> EngineConfig:
        """The run's engine leaf with these choices.

        Raises:
            ValueError: the leaf refuses them together (pydantic's ValidationError).
        """
        return EngineConfig.model_validate({**engine.model_dump(), **self.overlay()["engine"]})

    def overlay(self) -> dict[str, Any]:
        """As a mapping that is laid over a run config."""
        return {
            "engine": {
                "zero_stage": self.zero_stage,
                "offload": self.offload,
                "activation_checkpointing": self.checkpointing,
                "sequence_parallel": self.sharing,
            },
            "batches": {"micro_rows": self.micro_rows},
        }


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step on one GPU: `states` (of `in_backward` or `in_update`), `activations` of
    the heaviest micro-batch, `block` (one block recomputed), `loss` (logits of a chunk, fp32 gradient of the vocabulary
    matrix), `context`, `fragmentation`. host_bytes: per node."""

    moment: str
    states: int
    activations: int
    block: int
    loss: int
    context: int
    fragmentation: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.states + self.activations + self.block + self.loss + self.context + self.fragmentation

    def to_json(self) -> dict[str, Any]:
        return {"device_bytes": self.device_bytes, **asdict(self)}


def memory_of(subject: Subject, layout: Layout, states: ModelStates, ranks: int, gpus_per_node: int) -> Memory:
    """The fullest moment: the end of a forward pass, or the update."""
    load = subject.load(layout.checkpointing, layout.sharing)
    ratio = subject.heaviest[1]
    activations = round(load.total * ratio * layout.micro_rows)
    block, loss = round(load.block * ratio * layout.micro_rows), loss_bytes(subject, layout)
    backward = states.in_backward + activations + block + loss
    at_update = states.in_update > backward
    parts = (states.in_update, 0, 0, 0) if at_update else (states.in_backward, activations, block, loss)
    fragmentation = round(FRAGMENTATION_FRAC * sum(parts))
    host = host_bytes(subject, layout, states, ranks, gpus_per_node)
    return Memory("update" if at_update else "backward", *parts, CONTEXT_BYTES, fragmentation, host)


def loss_bytes(subject: Subject, layout: Layout) -> int:
    """Short-lived memory of the loss: logits of one chunk, the fp32 gradient of the vocabulary matrix, and the gradient
    of the hidden states (kernels/trichord_kernels/reference/linear_cross_entropy_chunks.py)."""
    trunk = subject.model.trunk
    if trunk is None:
        return 0
    item = 2 if subject.config.engine.precision != "fp32" else 4
    vocab, width = trunk.lm_head.out_features, trunk.lm_head.in_features
    labels = max(1, round(subject.executed.labels * layout.micro_rows / layout.sharing))
    logits = min(labels, chunk_rows("gpu", labels, vocab * item)) * vocab * item
    trains = any(p.requires_grad for p in trunk.lm_head.parameters())
    return logits + 4 * vocab * width * trains + item * labels * width


def host_bytes(subject: Subject, layout: Layout, states: ModelStates, ranks: int, gpus_per_node: int) -> int:
    """Per node: processes, what is offloaded, the copy that a checkpoint is written from, and batches made ahead. All
    ranks that share rows read the whole of them."""
    config = subject.config
    snapshot = checkpoint_bytes(subject.parameters, config.engine) // ranks
    batches = config.batches
    own_rows = -(-batches.rows_per_step // split_of(subject, layout, ranks).groups)
    media = subject.useful.images * 3 * config.samples.image.size**2
    media += 2 * subject.useful.frames * (config.encoders.audio.mel.hop_length if config.encoders.audio else 0)
    ahead = (batches.prefetch_steps + 2) * own_rows * (media + 64 * batches.row_tokens)
    workers = batches.num_workers + 1 if batches.num_workers else 0
    per_rank = PROCESS_BYTES + workers * WORKER_BYTES + states.host + snapshot + round(ahead)
    return min(ranks, gpus_per_node) * per_rank


def engine_of(subject: Subject, layout: Layout) -> EngineConfig:
    """Raises ValueError: the run's engine leaf refuses the layout."""
    key = replace(layout, micro_rows=1)
    if key not in subject.kept:
        subject.kept[key] = layout.engine(subject.config.engine)
    return subject.kept[key]


def states_of(subject: Subject, layout: Layout, ranks: int) -> tuple[Zero, ModelStates]:
    """Raises ValueError: the run's engine leaf refuses the layout."""
    key = (replace(layout, micro_rows=1), ranks)
    if key not in subject.kept:
        engine = engine_of(subject, layout)
        zero = Zero.of(engine, ranks, sum(p.numel for p in subject.parameters if p.trainable))
        subject.kept[key] = zero, model_states(subject.parameters, engine, zero)
    return subject.kept[key]


def split_of(subject: Subject, layout: Layout, ranks: int) -> RowSplit:
    return RowSplit(subject.config.batches.rows_per_step, ranks, layout.micro_rows, layout.sharing)


def check_groups(subject: Subject, layout: Layout, ranks: int) -> None:
    """Raises ConfigError: groups of ranks, for sequence parallelism or hpZ, do not fit the job or the model;
    ValueError: the run's engine leaf refuses the layout."""
    engine, batches = engine_of(subject, layout), subject.config.batches
    check_sharing(subject.model, engine, layout.micro_rows * batches.row_tokens, ranks)
    if ranks % engine.hpz_ranks:
        raise ConfigError(
            f"engine.hpz_ranks is {engine.hpz_ranks}, which does not divide {ranks} GPUs; set it to the GPUs of a node"
        )


def usable_bytes(gpu: Gpu) -> int:
    return round(gpu.memory_gib * GIB)
