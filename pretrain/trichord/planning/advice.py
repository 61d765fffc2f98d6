"""What would make a step shorter at stage 3 where small messages cost it time, each judged by the plan's own rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trichord.planning.comms import Collective
from trichord.planning.layout import engine_of, memory_of, states_of, usable_bytes
from trichord.planning.memory import model_states
from trichord.planning.roofline import collectives_of, step_time
from trichord.planning.search import Machine, Outcome
from trichord.planning.subject import Subject
from trichord.planning.zero import Zero

WORTH_FRAC = 0.05  # of the step: latency of gathers that is spoken of,
_GAIN_FRAC = 0.01  # and what has to be won by it
_PERSISTENCE = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold"


def advice(subject: Subject, outcome: Outcome, machine: Machine) -> list[dict[str, Any]]:
    """Of a layout: `set` (a key and its value), `why`, `latency_s` of the messages in question, and `step_s`, the
    step predicted with it; only what fits and makes the step shorter."""
    zero, _ = states_of(subject, outcome.layout, outcome.ranks)
    return [
        {"set": key, "why": why, "latency_s": latency, "step_s": step}
        for key, why, latency, changed in _candidates(subject, outcome, zero, machine)
        if latency > WORTH_FRAC * outcome.time.total
        and (step := _step_with(subject, outcome, changed, machine)) is not None
        and step < (1 - _GAIN_FRAC) * outcome.time.total
    ]


def _candidates(
    subject: Subject, outcome: Outcome, zero: Zero, machine: Machine
) -> Iterator[tuple[str, str, float, Zero]]:
    found = collectives_of(subject, outcome.layout, zero)
    small = [c for c in found if c.what == "small weights"]
    number = sum(c.messages for c in small)
    yield (
        f"{_PERSISTENCE}=0",
        f"{number} small weights are gathered one by one after each update; split, they travel with the others",
        _latency(small, machine, outcome.ranks),
        replace(zero, persistence=0),
    )
    node = machine.fabric.gpus_per_node
    if zero.hpz == 1 and node > 1 and outcome.ranks > node and outcome.ranks % node == 0:
        large = [c for c in found if c.op == "all_gather" and c.beside != "nothing"]
        why = f"{sum(c.messages for c in large)} gathers of weights go over all nodes; all but the first stay inside"
        yield f"engine.hpz_ranks={node}", why, _latency(large, machine, outcome.ranks), replace(zero, hpz=node)


def _latency(found: list[Collective], machine: Machine, ranks: int) -> float:
    return sum(c.latency_s(machine.fabric, ranks) for c in found)


def _step_with(subject: Subject, outcome: Outcome, zero: Zero, machine: Machine) -> float | None:
    """Seconds; None where it does not fit."""
    layout = outcome.layout
    states = model_states(subject.parameters, engine_of(subject, layout), zero)
    memory = memory_of(subject, layout, states, outcome.ranks, machine.fabric.gpus_per_node)
    if memory.device_bytes > usable_bytes(machine.gpu):
        return None
    return step_time(subject, layout, zero, states, machine.gpu, machine.fabric).total
