"""`trichord plan`: what a run will need and take, before it runs. No GPU, no weights: the model is shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from trichord.core.errors import ConfigError
from trichord.planning.advice import advice
from trichord.planning.assumptions import assumptions
from trichord.planning.dependence import keys_that_count
from trichord.planning.gpus import Fabric, find_gpu
from trichord.planning.layout import Layout, check_groups, split_of, states_of
from trichord.planning.memory import GIB, checkpoint_bytes
from trichord.planning.recomputation import MODES
from trichord.planning.roofline import collectives_of, flops_of_rows, model_flops
from trichord.planning.search import SCALES, Machine, Outcome, best_layout, judge, largest_useful, scaling
from trichord.planning.shortfall import limits, shortfall
from trichord.planning.subject import RunToPlan, Subject
from trichord.planning.workload import find_workload

T = TypeVar("T")

PLAN_FORMAT = 1
SECONDS_PER_DAY = 86_400
MOST_GPUS = 1_000_000


@dataclass(frozen=True)
class Question:
    """What is asked: GPUs, their kind and links, figures of the data, price of a GPU hour."""

    gpus: int
    gpu: str = "h100"
    gpus_per_node: int = 8
    node_gb_per_s: float | None = None
    host_gib: float | None = None
    stats: Path | None = None
    price: float | None = None
    vocab_size: int | None = None

    def machine(self) -> Machine:
        if self.gpus < 1:
            raise ConfigError(f"a plan needs at least 1 GPU, got {self.gpus}")
        if self.gpus > MOST_GPUS:
            raise ConfigError(f"a plan is for at most {MOST_GPUS:,} GPUs, got {self.gpus}")
        if self.price is not None and not 0 < self.price < math.inf:
            raise ConfigError(f"--price: expected the price of a GPU hour, above 0, got {self.price}")
        for option, value in (("--network", self.node_gb_per_s), ("--host-gib", self.host_gib)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{option}: expected a finite number above 0, got {value}")
        gpu = find_gpu(self.gpu)
        host = None if self.host_gib is None else round(self.host_gib * GIB)
        return Machine(gpu, Fabric.of(gpu, self.gpus_per_node, self.node_gb_per_s), host)


def plan(
    config: RunToPlan, question: Question, show: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Predict memory, time and cost of a run, and search for its best layout. show: is told of parts done, of so many.

    Returns:
        Plain data; bytes are ints, times seconds. `memory`, `activations`, `time`, `communication` are of the config's
        own layout, `best` of the fastest one that fits (None where none does), `scaling` of the best ones on 1 to 4,096
        GPUs. docs/guides/planning.md lists the keys. `render_plan` makes it readable.

    Raises:
        ConfigError: no GPUs, an unknown GPU, figures that do not belong to the run, a model that cannot be built, or
            groups of ranks that do not fit it.
    """
    machine = question.machine()
    steps = _Steps(show, len(MODES) + len(SCALES) + 2)
    subject = Subject(config, find_workload(config, question.stats), question.vocab_size)
    chosen = Layout.of(subject)
    check_groups(subject, chosen, question.gpus)
    for mode in MODES:
        steps.done(subject.load(mode, chosen.sharing))
    own = steps.done(judge(subject, chosen, question.gpus, machine))
    best = steps.done(best_layout(subject, question.gpus, machine))
    scaled = [steps.done(outcome) for outcome in scaling(subject, machine)]
    missing = shortfall(subject, question.gpus, machine) if best is None else None
    parameters = subject.count_parameters()
    checkpoint = checkpoint_bytes(subject.parameters, config.engine)
    price = question.price
    return {
        "format": PLAN_FORMAT,
        "prediction": True,
        "run": config.run.name,
        "config": keys_that_count(config),
        "gpus": question.gpus,
        "gpu": {"key": question.gpu, **asdict(machine.gpu)},
        "fabric": asdict(machine.fabric),
        "vocab_size": subject.vocab_size,
        "parameters": parameters,
        "trainable": sum(room["trainable"] for room in parameters.values()),
        "frozen": sum(room["frozen"] for room in parameters.values()),
        "workload": _workload(subject),
        "precision": config.engine.precision,
        "optimizer": config.engine.optimizer,
        "chosen": own.to_json(),
        "memory": {**own.memory.to_json(), "states_by_kind": asdict(own.states), "fits": own.fits,
                   "exceeds": list(own.exceeds), "host_limit_bytes": machine.host_bytes},
        "states": _all_stages(subject, chosen, question.gpus),
        "activations": _activations(subject, chosen),
        "rows": _rows(subject, chosen, question.gpus),
        "flops": _flops(subject, chosen),
        "time": {**own.time.to_json(), "mfu_frac": own.mfu_frac, "rule": subject.rule},
        "communication": _communication(subject, chosen, question.gpus, machine),
        "cost": _cost(config, own, price),
        "best": None if best is None else {**best.to_json(), "cost": _cost(config, best, price)},
        "none_fits": None if missing is None else asdict(missing),
        "advice": advice(subject, own, machine),
        "overlay": None if best is None else best.layout.overlay(),
        "scaling": [None if o is None else {**o.to_json(), "gpus": o.ranks, "cost": _cost(config, o, price)}
                    for o in scaled],
        "scaling_limits": limits(subject, scaled, machine),
        "largest_useful_gpus": largest_useful(scaled),
        "checkpoint": {
            "bytes": checkpoint,
            "per_rank_bytes": checkpoint // question.gpus,
            "kept_bytes": checkpoint * _kept(config),
        },
        "assumptions": assumptions(subject, machine),
        "not_predicted": ["the loader", "evaluation", "restarts and failed nodes", "compilation"],
    }  # fmt: skip


@dataclass
class _Steps:
    """Counts what a plan has done."""

    show: Callable[[int, int], None]
    total: int
    number: int = 0

    def __post_init__(self):
        self.show(0, self.total)

    def done(self, result: T) -> T:
        self.number += 1
        self.show(self.number, self.total)
        return result


def _workload(subject: Subject) -> dict[str, Any]:
    return {
        "origin": list(subject.workload.origin),
        "sources": [
            {
                "name": source.name,
                "share": source.share,
                "images": source.images,
                "clips": source.clips,
                "clip_seconds": source.clip_seconds.mean,
                "text_tokens": min(source.text_tokens.mean, subject.config.batches.row_tokens),
            }
            for source in subject.workload.sources
        ],
        "row": asdict(subject.useful),
    }


def _all_stages(subject: Subject, chosen: Layout, gpus: int) -> dict[int, dict[str, int]]:
    """Model states at every stage, with the run's precision and offload where the stage allows them."""
    found = {}
    for stage in (0, 1, 2, 3):
        try:
            layout = replace(chosen, zero_stage=stage)
            states = states_of(subject, layout, gpus)[1]
        except ValueError:  # refused by the config
            continue
        found[stage] = asdict(states) | {"held": states.held, "in_backward": states.in_backward}
    return found


def _activations(subject: Subject, layout: Layout) -> dict[str, Any]:
    """Of one micro-batch on a GPU, by room: typical rows, and what the heaviest source's rows take instead."""
    loads = {mode: subject.load(mode, layout.sharing) for mode in MODES}
    load = loads[layout.checkpointing]
    saved = {room: round(size * layout.micro_rows) for room, size in load.saved.items()}
    source, ratio = subject.heaviest
    return {
        "by_room": saved,
        "bytes": sum(saved.values()),
        "heaviest_source": source,
        "heaviest_ratio": ratio,
        "recomputed_block_bytes": round(load.block * layout.micro_rows),
        "bytes_per_row": {mode: round(kind.total) for mode, kind in loads.items()},
    }


def _rows(subject: Subject, layout: Layout, gpus: int) -> dict[str, Any]:
    config, split = subject.config, split_of(subject, layout, gpus)
    better = split.better()
    return {
        "rows_per_step": split.rows,
        "row_tokens": config.batches.row_tokens,
        "tokens_per_step": split.rows * config.batches.row_tokens,
        "useful_frac": subject.useful.tokens / config.batches.row_tokens,
        "micro_rows": split.micro_rows,
        "accumulation": split.accumulation,
        "sequence_parallel": split.sharing,
        "wasted_frac": split.wasted_frac,
        "idle_ranks": split.idle_ranks,
        "better_micro_rows": better.micro_rows if better else None,
        "better_wasted_frac": better.wasted_frac if better else None,
        "max_steps": config.run.max_steps,
        "num_workers": config.batches.num_workers,
        "prefetch_steps": config.batches.prefetch_steps,
    }


def _flops(subject: Subject, layout: Layout) -> dict[str, Any]:
    rows = subject.config.batches.rows_per_step
    rooms = flops_of_rows(subject, layout, 1, rows=rows, useful=True)
    return {"model": model_flops(subject, layout), "by_room": {room: flops.model for room, flops in rooms.items()}}


def _communication(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> dict[str, Any]:
    """Per step: bytes of the tensors that travel, and what one GPU sends of them."""
    zero, _ = states_of(subject, layout, gpus)
    found = collectives_of(subject, layout, zero)
    lines = [
        {**asdict(c), "sent_bytes": round(c.sent(gpus)), "seconds": c.seconds(machine.fabric, gpus)} for c in found
    ]
    return {"sent_bytes": sum(line["sent_bytes"] for line in lines), "collectives": lines}


def _cost(config: RunToPlan, outcome: Outcome, price: float | None) -> dict[str, Any]:
    """Of the whole run; None where its length, or the price, is not known."""
    steps = config.run.max_steps
    seconds = None if steps is None else steps * outcome.time.total
    hours = None if seconds is None else seconds * outcome.ranks / 3600
    return {
        "days": None if seconds is None else seconds / SECONDS_PER_DAY,
        "gpu_hours": hours,
        "price_per_gpu_hour": price,
        "cost": None if hours is None or price is None else hours * price,
    }


def _kept(config: RunToPlan) -> int:
    """Checkpoints on the disk at once: those that are kept, and the one that is being written."""
    kept, steps = config.checkpoints, config.run.max_steps
    every = getattr(kept, "keep_every_steps", None)
    landmarks = steps // every if steps is not None and every else 0
    best: Any = getattr(kept, "keep_best", None)
    return (kept.keep_last or 0) + landmarks + (best.count if best else 0) + 1
