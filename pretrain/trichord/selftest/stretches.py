"""One stretch of a job: some steps on some ranks and workers, from one state to the next."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from trichord.batches.loader import Loader, LoaderState
from trichord.selftest.mixture import LENGTHS, Mixture

_CONTEXT = get_context("fork")


@dataclass(frozen=True)
class Shape:
    """What a stretch runs on. processes: a process per rank; else the ranks take turns in this one."""

    world_size: int = 1
    num_workers: int = 0
    deal_ranks: int = 1
    processes: bool = False


@dataclass
class Seen:
    """What came: sample references (n, 3) of source, epoch and sample, and what was quarantined, by shard and key."""

    refs: list[np.ndarray] = field(default_factory=list)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.refs += other.refs
        self.bad.update(other.bad)

    def all_refs(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 3), dtype=np.int64), *self.refs])


def run_stretch(
    mixture: Mixture, seed: int, shape: Shape, start: LoaderState | None, steps: int | None, wasted: int = 0
) -> tuple[LoaderState, Seen]:
    """The merged state after `steps` steps (None: until all is used up), and what came in them.

    wasted: steps that each rank goes on before it ends, as a job does that dies some time after its last checkpoint.
    """
    parts = _in_processes(mixture, seed, shape, start, steps, wasted) if shape.processes else [
        _run_rank(mixture, seed, shape, rank, start, steps, wasted) for rank in range(shape.world_size)
    ]  # fmt: skip
    seen = Seen()
    for _, found in parts:
        seen.add(found)
    return LoaderState.merge([LoaderState.from_json(json.loads(state)) for state, _ in parts]), seen


def _run_rank(
    mixture: Mixture, seed: int, shape: Shape, rank: int, start: LoaderState | None, steps: int | None, wasted: int
) -> tuple[str, Seen]:
    """One rank's state as JSON text and what came to it."""
    batches = mixture.batches.model_copy(update={"num_workers": shape.num_workers, "deal_ranks": shape.deal_ranks})
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)  # torch counts cores
    loader = Loader(
        mixture.shards, mixture.samples, batches,
        seed=seed, lengths=LENGTHS, rank=rank, world_size=shape.world_size, state=start,
    )  # fmt: skip
    seen = Seen()
    state = json.dumps(loader.state_dict())
    try:
        for step in _kept(loader, steps):
            for batch in step.micro_batches:
                seen.refs.append(batch.sample_ids[~batch.bad_segments].numpy())
            seen.bad.update((record.shard, record.key or "") for record in step.stats.records)
        state = json.dumps(loader.state_dict())
        for _ in islice(iter(loader), wasted):
            pass
    finally:
        loader.close()
    return state, seen


def _kept(loader: Loader, steps: int | None) -> Iterable[Any]:
    for step in islice(iter(loader), steps):
        yield step
        if steps is None and step.state.exhausted:
            return


def _in_processes(
    mixture: Mixture, seed: int, shape: Shape, start: LoaderState | None, steps: int | None, wasted: int
) -> list[tuple[str, Seen]]:
    """All ranks at once, each in a process of its own."""
    running = []
    for rank in range(shape.world_size):
        ours, theirs = _CONTEXT.Pipe()
        task = (theirs, mixture, seed, shape, rank, start, steps, wasted)
        process = _CONTEXT.Process(target=_answer, args=task)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        return [_received(rank, pipe) for rank, (_, pipe) in enumerate(running)]
    finally:
        for process, pipe in running:
            pipe.close()
            process.join(30)
            process.kill()


def _answer(pipe: Connection, *task: Any) -> None:
    pipe.send(_run_rank(*task))


def _received(rank: int, pipe: Connection) -> tuple[str, Seen]:
    try:
        return pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"the process of rank {rank} died; its traceback is above") from error
