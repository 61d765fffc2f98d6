"""A step that does not end: what each rank says it does, which of them the others wait for, and how to say it.

Every rank's watcher puts a `Sight` of its process in the job's store with its beat. Nobody reads them all until nothing
has moved on rank 0 for a while; then rank 0 reads them and judges:

    collectives entered differ  ->  the ranks behind: the others wait in a collective that these have not come to
    phases differ               ->  the odd ones out
    all alike                   ->  nobody: the network, the storage, or the devices
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from trichord.core.log import DUMP_SIGNAL, log_stream
from trichord.core.phase import current_phase, notes, other_phases, worker_phases

MAX_LINES = 16
_RESTING = ("wait for work", "start")


@dataclass(frozen=True)
class Sight:
    """One rank at its last beat.

    step: optimizer steps done; phase: of its main thread, with its facts; age_s: for how long; idle_s: for how long
    nothing in it moved, threads and data workers included; collectives: how many it has entered, in all its groups;
    holds: the modalities in its micro-batches; workers: data workers that are at something.
    """

    rank: int
    step: int
    phase: str
    age_s: float
    idle_s: float
    collectives: int
    holds: str
    workers: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Sight:
        values = json.loads(text)
        return cls(**{**values, "workers": tuple(values["workers"])})

    def __str__(self) -> str:
        workers = f" ({'; '.join(self.workers)})" if self.workers else ""
        return f"{self.phase}{workers}, for {self.age_s:.0f} s"


def look(rank: int, step: int) -> Sight:
    """This process, now. Host numbers only."""
    now, main = time.monotonic(), current_phase()
    working = [worker for worker in worker_phases() if worker.phase is not None]
    moved = [said.since for said in (main, *other_phases().values(), *(worker.phase for worker in working)) if said]
    busy = [worker for worker in working if worker.phase and worker.phase.name not in _RESTING]
    # What the workers do is told where the main thread waits for them; the longest at it first.
    busy = sorted(busy, key=lambda worker: worker.phase.since if worker.phase else now)
    told = busy[:2] if main is not None and main.name == "data wait" else []
    return Sight(
        rank=rank,
        step=step,
        phase=str(main) if main is not None else "start",
        age_s=round(now - main.since, 1) if main is not None else 0.0,
        idle_s=round(now - max(moved), 1) if moved else 0.0,
        collectives=_collectives(),
        holds=_modalities(),
        workers=tuple(f"{w.name}: {w.phase}, for {w.phase.age_s:.0f} s" for w in told if w.phase),
    )


def _collectives() -> int:
    """How many collectives this process has entered: groups number theirs."""
    total = 0
    with suppress(Exception):  # private to torch: a figure less must not cost the verdict
        for group in list(dist.distributed_c10d._world.pg_map):
            total += group._get_sequence_number_for_group()
    return total


def _modalities() -> str:
    batches = notes().get("micro_batches", ())
    found = [("images", "images"), ("clips", "audio")]
    return "+".join(["text", *(name for key, name in found if any(batch[key] for batch in batches))])


def dump_stacks(why: str) -> None:
    """Write the python stacks of all threads to this rank's log, and have its busy data workers add theirs."""
    stream = log_stream()
    with suppress(OSError, ValueError):
        stream.write(f"stacks of this rank: {why}\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
    for worker in worker_phases():
        if worker.pid and worker.phase is not None and worker.phase.name not in _RESTING:
            with suppress(OSError):
                os.kill(worker.pid, DUMP_SIGNAL)


def stuck_ranks(sights: Sequence[Sight]) -> list[int]:
    """Those that the others wait for; none where all are alike."""
    fewest = min(sight.collectives for sight in sights)
    behind = [sight.rank for sight in sights if sight.collectives == fewest]
    if len(behind) < len(sights):
        return behind
    groups = _alike(sights)
    odd = [sight.rank for group in groups[:-1] for sight in group]  # the last group is the largest
    return odd if len(odd) < len(sights) / 2 or len(sights) <= 2 else []


def describe(sights: Sequence[Sight], stuck: Sequence[int], idle_s: float) -> str:
    """One line: who, in what, with what, and since when."""
    step = max(sight.step for sight in sights) + 1
    opening = f"step {step} has not moved for {idle_s:.0f} s"
    if len(sights) == 1:
        return f"{opening}: {sights[0]}; its micro-batches hold {sights[0].holds}"
    if not stuck:
        return (
            f"{opening}: all {len(sights)} ranks are in {sights[0].phase}, after {sights[0].collectives} collectives "
            "each: look at the network, the devices and the storage they share"
        )
    named = [sight for sight in sights if sight.rank in set(stuck)]
    told = "; ".join(f"rank {sight.rank} is in {sight}, holding {sight.holds}" for sight in named[:3])
    more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
    most = max(sight.collectives for sight in sights)
    behind = f"; entered {named[0].collectives} collectives, the others {most}" if named[0].collectives < most else ""
    return f"{opening}: {told}{more}{behind}"


def table(sights: Sequence[Sight]) -> list[str]:
    """All ranks, those that are alike in one line, the rarest first, at most `MAX_LINES` lines."""
    groups = _alike(sights)
    lines = [
        f"ranks {_ranges([sight.rank for sight in group])}: {group[0]}, {group[0].collectives} collectives, "
        f"step {group[0].step}, holding {group[0].holds}"
        for group in groups[:MAX_LINES]
    ]
    left_out = sum(len(group) for group in groups[MAX_LINES:])
    return lines + ([f"and {left_out} ranks more"] if left_out else [])


def _alike(sights: Sequence[Sight]) -> list[list[Sight]]:
    """Ranks by what they do and how many collectives they have entered; the smallest group first."""
    groups: dict[tuple, list[Sight]] = {}
    for sight in sights:
        groups.setdefault((sight.phase, sight.collectives, sight.holds, sight.workers), []).append(sight)
    return sorted(groups.values(), key=lambda group: (len(group), group[0].rank))


def _ranges(ranks: Sequence[int]) -> str:
    """`0, 2-7` of [0, 2, 3, 4, 5, 6, 7]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:20])
    return shown + (", ..." if len(runs) > 20 else "")
