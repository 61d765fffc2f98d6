"""Running the same function over many tasks: here, in processes of this machine, or as Ray tasks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from trichord.core.errors import DataError
from trichord.core.processes import enter_worker
from trichord.core.stopping import signals_held, signals_kept

_RAY_TASKS_AHEAD = 4
"""Ray tasks handed over at a time, per worker."""
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int = 1, ray: bool = False
) -> Generator[Result, None, None]:
    """The results, in the order they get done. workers: processes, or with Ray the CPUs of a cluster started here.

    Raises:
        DataError: a process died (killed, or out of memory).
    """
    if ray:
        yield from _run_on_ray(function, tasks, workers)
    elif workers <= 1 or len(tasks) <= 1:
        yield from map(function, tasks)
    else:
        yield from _run_in_processes(function, tasks, min(workers, len(tasks)))


def _run_in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    # spawn: the caller may hold threads (torch, an event loop of fsspec) that do not survive a fork
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=enter_worker, initargs=(os.getpid(),)
    )
    try:
        with signals_held():
            futures = [pool.submit(function, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that wrote shards died (killed, or out of memory); run the same command again, with fewer "
            "--workers if memory was short: finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_on_ray(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    with _ray_cluster(workers) as ray:
        remote: Any = ray.remote(function)
        ahead = _RAY_TASKS_AHEAD * max(workers, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(tasks)[::-1]
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < ahead:
                    running.append(remote.remote(waiting.pop()))
                done, running = ray.wait(running)
                yield from ray.get(done)
        except ray.exceptions.RayError as error:
            raise DataError(
                f"Ray gave up on a shard: {error}; run the same command again: finished shards are kept"
            ) from error


@contextmanager
def _ray_cluster(workers: int) -> Iterator[Any]:
    """The cluster of the caller or at $RAY_ADDRESS; else one of `workers` CPUs here that is stopped after it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = "RAY_ADDRESS" not in os.environ
    if own:  # read when ray is imported: only then does a cluster on one machine keep to the loopback address
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    # its sockets lie there, whose paths may have 107 characters: $TMPDIR may be too long
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as logs:
        try:
            options = {"num_cpus": workers, "include_dashboard": False, "_temp_dir": logs} if own else {}
            _start(ray, **options)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, **options: Any) -> None:
    """`ray.init`, with our answer to signals: Ray's exits in its own way, and its C++ handler prints a stack."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for us alone, not for the cluster
    try:
        with signals_kept():
            ray.init(log_to_driver=False, **options)
    except SystemExit:
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
