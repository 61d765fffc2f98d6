"""Work shared out over processes, with bounded memory and results in the order of the jobs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import TypeVar

from trichord.core.errors import DataError
from trichord.core.log import quiet_libraries
from trichord.core.processes import enter_worker
from trichord.core.silence import silence_here_too
from trichord.core.stopping import signals_held
from trichord.encoders.lengths import known_grids, remember_grids
from trichord.shards.config import StorageConfig
from trichord.shards.storage import configure_storage

Job = TypeVar("Job")
Result = TypeVar("Result")
_JOBS_AHEAD = 4  # per process: enough to keep all busy, and results do not pile up


class Processes:
    """Some worker processes, started when there is work for two and kept until the end: each takes seconds to start."""

    def __init__(self, workers: int, storage: StorageConfig) -> None:
        """storage: how shards are read, here and in the workers."""
        self._workers, self._storage = workers, storage
        self._pool: ProcessPoolExecutor | None = None
        self._silence = silence_here_too()  # one worker is this process

    def __enter__(self) -> Processes:
        configure_storage(self._storage)
        self._silence.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._silence.__exit__(None, None, None)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """(job, result) of every job, in order. `work` is a function of a module; jobs and results can be pickled.

        With one worker, or one job, all happens in this process.

        Raises:
            DataError: a process died: a decoder crashed, or memory ran out.
        """
        todo = iter(jobs)
        first = list(islice(todo, 2))
        todo = chain(first, todo)
        if self._workers <= 1 or len(first) < 2:
            yield from ((job, work(job)) for job in todo)
            return
        if self._pool is None:
            # spawn: the caller may hold threads (torch, an event loop of fsspec) that do not survive a fork
            told = (os.getpid(), self._storage, known_grids())
            self._pool = ProcessPoolExecutor(self._workers, get_context("spawn"), _enter, told)
        yield from _in_order(self._pool, work, todo, self._workers * _JOBS_AHEAD)


def _enter(parent_pid: int, storage: StorageConfig, grids: dict[tuple[str, int], tuple[int, int]]) -> None:
    quiet_libraries()  # before torch is imported: each process would repeat what the first has kept quiet
    enter_worker(parent_pid)
    configure_storage(storage)
    remember_grids(grids)


def _in_order(
    pool: ProcessPoolExecutor, work: Callable[[Job], Result], todo: Iterator[Job], ahead: int
) -> Iterator[tuple[Job, Result]]:
    with signals_held():
        running = deque((job, pool.submit(work, job)) for job in islice(todo, ahead))
    while running:
        job, future = running.popleft()
        try:
            yield job, future.result()
            running.extend((job, pool.submit(work, job)) for job in islice(todo, 1))
        except BrokenProcessPool as error:
            raise DataError(
                f"a process died (a decoder crashed, or memory ran out) near {job}; with --workers 1 the fault shows "
                "itself, with fewer workers less memory is needed"
            ) from error
