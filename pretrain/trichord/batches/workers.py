"""Worker processes: each owns some lanes of its rank and sends one parcel per step, in step.

A parcel carries all arrays of a step in one block of shared memory: one file descriptor however many rows there are,
and nothing large goes through the pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trichord.batches.lane_reader import LaneGroup, LaneStep
from trichord.batches.rows import RowArrays
from trichord.core.errors import TrichordError

_ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1
_CLOSE_SECONDS = 5.0
_IGNORED_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})

GroupMaker = Callable[[Sequence[int]], LaneGroup]
"""Makes the reader of some lanes, from where the loader stands."""


@dataclass(frozen=True)
class Parcel:
    """One worker's part of a step. steps: with their rows' arrays replaced by (offset, shape, dtype) in `block`."""

    steps: list[tuple[LaneStep, dict[str, tuple[int, tuple[int, ...], str]]]]
    block: torch.Tensor


@dataclass(frozen=True)
class WorkerFault:
    """An error that ends the run with one message; it travels as data, since an exception would grow a traceback."""

    kind: type[TrichordError]
    message: str


def pack_parcel(steps: Sequence[LaneStep]) -> Parcel:
    """Copy the arrays of a step into one block."""
    size, packed, copies = 0, [], []
    for step in steps:
        places = {}
        for field in fields(RowArrays):
            array = getattr(step.row, field.name)
            places[field.name] = (size, array.shape, array.dtype.str)
            copies.append((size, array))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        packed.append((replace(step, row=None), places))
    block = torch.empty(size, dtype=torch.uint8)
    view = block.numpy()
    for offset, array in copies:
        view[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Parcel(packed, block)


def unpack_parcel(parcel: Parcel) -> list[LaneStep]:
    """The steps again; their arrays are views of the block."""
    view = parcel.block.numpy()
    steps = []
    for step, places in parcel.steps:
        arrays = {}
        for name, (offset, shape, dtype) in places.items():
            count = int(np.prod(shape))
            size = count * np.dtype(dtype).itemsize
            arrays[name] = view[offset : offset + size].view(dtype).reshape(shape)
        steps.append(replace(step, row=RowArrays(**arrays)))
    return steps


class _LaneStream(IterableDataset):
    """What a worker runs: parcels of the lanes that are its own, for ever."""

    def __init__(self, lanes: Sequence[int], make_group: GroupMaker) -> None:
        self._lanes = list(lanes)
        self._make_group = make_group

    def __iter__(self) -> Iterator[Parcel | WorkerFault]:
        info = get_worker_info()
        assert info is not None, "the stream runs in worker processes only"
        try:
            for steps in self._make_group(self._lanes[info.id :: info.num_workers]).steps():
                yield pack_parcel(steps)
        except TrichordError as error:
            yield WorkerFault(type(error), str(error))


def read_in_workers(
    lanes: Sequence[int], make_group: GroupMaker, num_workers: int, prefetch_steps: int
) -> Iterator[list[LaneStep]]:
    """One row of every lane per step, read by `num_workers` processes, each at most `prefetch_steps` ahead.

    Closing the generator ends the processes.

    Raises:
        TrichordError: the first error of a worker, of its own class.
        RuntimeError: a worker died, or met a fault in the code.
    """
    num_workers = min(num_workers, len(lanes))
    loader = DataLoader(
        _LaneStream(lanes, make_group),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_steps,
        collate_fn=_as_it_is,
        worker_init_fn=partial(enter_worker, os.getpid()),
        multiprocessing_context="fork",  # a worker starts in milliseconds and shares the indices of all shards
        persistent_workers=True,
    )
    parcels = _start(loader)
    # Where nobody closes the generator, multiprocessing's exit would send the SIGTERM that workers ignore and wait for
    # them for ever. Its own finalizers run before that, in plain and in forked processes.
    close = Finalize(None, _close, args=(parcels,), exitpriority=100)
    try:
        while True:
            by_lane: dict[int, LaneStep] = {}
            for _ in range(num_workers):  # DataLoader hands the workers' items out in turn
                parcel = next(parcels)
                if isinstance(parcel, WorkerFault):
                    raise parcel.kind(parcel.message)
                by_lane |= {step.lane: step for step in unpack_parcel(parcel)}
            yield [by_lane[lane] for lane in lanes]
    finally:
        close()


def _start(loader: DataLoader) -> Any:
    """Fork the workers with the job's signals held back until each has said how it takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(item: Any) -> Any:
    return item


def enter_worker(parent_pid: int, worker: int) -> None:
    """First thing in a worker: one thread, no share in the job's signals, no life beyond the parent.

    Schedulers and terminals signal the whole process group; the rank decides what to do about it and still needs its
    next batch for that, so its workers do not react.
    """
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _close(parcels: Any) -> None:
    """End the workers in order; kill those that hang in a read, since they ignore the SIGTERM that torch would send.

    Uses the iterator's private parts: torch has no public way to end it, and none that a hanging worker obeys.
    """
    parcels._workers_done_event.set()
    for queue in parcels._index_queues:
        queue.put(None)
    deadline = time.monotonic() + _CLOSE_SECONDS
    for worker in parcels._workers:
        worker.join(timeout=max(0.0, deadline - time.monotonic()))
    with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler reports what is killed here
        for worker in parcels._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
    parcels._shutdown_workers()
