"""Why no layout fits: memory of a GPU, memory of a node, or the config allows none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trichord.planning.layout import usable_bytes
from trichord.planning.search import SCALES, Machine, Outcome, best_layout, judge, layouts, sharings
from trichord.planning.subject import Subject

Limit = Literal["gpu", "host", "config"]


@dataclass(frozen=True)
class Shortfall:
    """limit: what no layout keeps; least_bytes: what the most modest one needs of it, None for `config`."""

    limit: Limit
    least_bytes: int | None


def shortfall(subject: Subject, ranks: int, machine: Machine) -> Shortfall:
    """Of a number of GPUs for which `best_layout` found nothing. Every allowed layout is looked at."""
    shared = sharings(ranks, machine.fabric.gpus_per_node)
    found = [judge(subject, layout, ranks, machine) for size in shared for layout in layouts(subject, ranks, size)]
    if not found:
        return Shortfall("config", None)
    limit = usable_bytes(machine.gpu)
    on_gpu = [outcome.memory.host_bytes for outcome in found if outcome.memory.device_bytes <= limit]
    if on_gpu:
        return Shortfall("host", min(on_gpu))
    return Shortfall("gpu", min(outcome.memory.device_bytes for outcome in found))


def limits(subject: Subject, scaled: list[Outcome | None], machine: Machine) -> list[Limit | None]:
    """For each of `SCALES` what no layout keeps, None where one fits."""
    return [None if outcome is not None else _limit(subject, ranks, machine) for ranks, outcome in zip(SCALES, scaled)]


def _limit(subject: Subject, ranks: int, machine: Machine) -> Limit:
    """As `shortfall` says, without its figure and in less time."""
    if machine.host_bytes is not None and best_layout(subject, ranks, replace(machine, host_bytes=None)) is not None:
        return "host"
    shared = sharings(ranks, machine.fabric.gpus_per_node)
    return "gpu" if any(next(layouts(subject, ranks, size), None) for size in shared) else "config"
