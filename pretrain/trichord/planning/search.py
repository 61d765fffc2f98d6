"""The layouts that fit a GPU, and the fastest of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trichord.core.errors import ConfigError
from trichord.planning.gpus import Fabric, Gpu
from trichord.planning.layout import (
    CONTEXT_BYTES,
    Layout,
    Memory,
    check_groups,
    memory_of,
    split_of,
    states_of,
    usable_bytes,
)
from trichord.planning.memory import ModelStates
from trichord.planning.recomputation import MODES
from trichord.planning.roofline import StepTime, model_flops, step_time
from trichord.planning.subject import Subject

SCALES = tuple(2**power for power in range(13))  # 1 to 4,096 GPUs
_WORTH_DOUBLING = 0.8  # of the time of a step that twice the GPUs may take at most to be called useful
_MAX_MICRO_ROWS = 64


@dataclass(frozen=True)
class Outcome:
    """A layout on `ranks` GPUs: what it takes. mfu_frac: model FLOPs over time and the GPUs' peak; exceeds: `gpu`,
    `host` where the memory of a GPU or of a node is too small."""

    layout: Layout
    ranks: int
    accumulation: int
    idle_ranks: int
    states: ModelStates
    memory: Memory
    time: StepTime
    mfu_frac: float
    exceeds: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.exceeds

    def to_json(self) -> dict[str, Any]:
        return {
            "zero_stage": self.layout.zero_stage,
            "micro_rows": self.layout.micro_rows,
            "accumulation": self.accumulation,
            "idle_ranks": self.idle_ranks,
            "offload": self.layout.offload,
            "activation_checkpointing": self.layout.checkpointing,
            "sequence_parallel": self.layout.sharing,
            "device_bytes": self.memory.device_bytes,
            "step_s": self.time.total,
            "exposed_s": self.time.exposed,
            "mfu_frac": self.mfu_frac,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Machine:
    """GPUs of a kind, how they are linked, and host memory of a node where it is known."""

    gpu: Gpu
    fabric: Fabric
    host_bytes: int | None = None


def judge(subject: Subject, layout: Layout, ranks: int, machine: Machine) -> Outcome:
    """Memory and time of one layout.

    Raises:
        ValueError: the config refuses the layout.
    """
    zero, states = states_of(subject, layout, ranks)
    memory = memory_of(subject, layout, states, ranks, machine.fabric.gpus_per_node)
    time = step_time(subject, layout, zero, states, machine.gpu, machine.fabric)
    peak = machine.gpu.fp32_tflops if subject.config.engine.precision == "fp32" else machine.gpu.bf16_tflops
    mfu = model_flops(subject, layout) / (time.total * ranks * 1e12 * peak)
    over_gpu = memory.device_bytes > usable_bytes(machine.gpu)
    over_host = machine.host_bytes is not None and memory.host_bytes > machine.host_bytes
    exceeds = tuple(name for name, over in (("gpu", over_gpu), ("host", over_host)) if over)
    split = split_of(subject, layout, ranks)
    return Outcome(layout, ranks, split.accumulation, split.idle_ranks, states, memory, time, mfu, exceeds)


def layouts(subject: Subject, ranks: int, sharing: int = 1) -> Iterator[Layout]:
    """All layouts that the config allows, with so many ranks that share rows: every stage, offload and kind of
    activation checkpointing, and as many rows per micro-step as do not leave more rows empty than one row per
    micro-step does."""
    rows = -(-subject.config.batches.rows_per_step // (ranks // sharing))
    # Only divisors of a rank's rows: others would compute empty ones.
    sizes = [size for size in range(1, min(rows, _MAX_MICRO_ROWS) + 1) if rows % size == 0]
    for stage in (0, 1, 2, 3):
        for offload in ("none", "optimizer", "all"):
            for mode in MODES:
                for size in sizes:
                    layout = Layout(stage, size, offload, mode, sharing)
                    if _is_allowed(subject, layout, ranks):
                        yield layout


def _is_allowed(subject: Subject, layout: Layout, ranks: int) -> bool:
    try:
        check_groups(subject, layout, ranks)
    except (ConfigError, ValueError):
        return False
    return True


def best_layout(subject: Subject, ranks: int, machine: Machine) -> Outcome | None:
    """The fastest layout that fits; of equally fast ones that with the most memory left; None where none fits.

    Rows are shared as the run has it, and otherwise only where nothing fits, or GPUs idle, among fewer ranks."""
    own = Layout.of(subject).sharing
    best = _fastest(subject, ranks, machine, own) if ranks % own == 0 else None
    for sharing in sharings(ranks, machine.fabric.gpus_per_node):
        found = _fastest(subject, ranks, machine, sharing) if sharing != own else best
        best = min(filter(None, (best, found)), key=_preference, default=None)
        if found is not None and not found.idle_ranks:
            return best
    return best


def sharings(ranks: int, gpus_per_node: int) -> list[int]:
    """Numbers of ranks, all of one node, that may share rows, least exchange first."""
    powers = (2**power for power in range(gpus_per_node.bit_length()))
    return [sharing for sharing in powers if sharing <= gpus_per_node and ranks % sharing == 0]


def _preference(outcome: Outcome) -> tuple[float, int]:
    return round(outcome.time.total, 4), outcome.memory.device_bytes


def _fastest(subject: Subject, ranks: int, machine: Machine, sharing: int) -> Outcome | None:
    limit = usable_bytes(machine.gpu) - CONTEXT_BYTES
    # Without its activations first: most of what does not fit shows there, and costs no look at the model.
    possible = [
        layout
        for layout in layouts(subject, ranks, sharing)
        if states_of(subject, layout, ranks)[1].in_backward <= limit
    ]
    fitting = [outcome for layout in possible if (outcome := judge(subject, layout, ranks, machine)).fits]
    return min(fitting, key=_preference, default=None)


def scaling(subject: Subject, machine: Machine) -> Iterator[Outcome | None]:
    """The best layout on each number of GPUs of `SCALES`, the same global batch throughout."""
    return (best_layout(subject, ranks, machine) for ranks in SCALES)


def largest_useful(scaled: Iterable[Outcome | None]) -> int | None:
    """The number of GPUs up to which each doubling makes a step at least a fifth shorter; None where nothing fits."""
    useful: Outcome | None = None
    for outcome in scaled:
        if outcome is None:
            continue
        if useful is not None and outcome.time.total > _WORTH_DOUBLING * useful.time.total:
            break
        useful = outcome
    return useful.ranks if useful is not None else None
