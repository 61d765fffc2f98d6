"""The processes of a loader: one that plans, and some that decode rows, any of them any row.

    planner process --planned steps--> this process --rows to decode--> decode workers --arrays--> this process

Decoded rows travel in shared memory (batches/parcels.py), nothing large goes through a pipe.
Rows to decode are pickled once, by the planner, and passed on as bytes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import re
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trichord.batches.decoding import DecodedRow, RowDecoder
from trichord.batches.parcels import Parcel, pack_parcel, unpack_parcel
from trichord.batches.slots import RowSlots
from trichord.batches.step_planner import PlannedStep, StepPlanner
from trichord.core.errors import TrichordError
from trichord.core.log import DUMP_SIGNAL, log_stream
from trichord.core.phase import PhaseBoard, current_phase, set_phase, worker_phases
from trichord.core.processes import die_with_parent

_CLOSE_SECONDS = 5.0
_GC_THRESHOLD = 50_000
"""New objects between two looks for garbage. Python's 700 are made every 15 samples of a window, and all are kept."""
_LESS_MEMORY = (
    "lower batches.num_workers or batches.prefetch_steps; then start again, the run goes on from its checkpoint"
)
_PIDS = re.compile(r"pid\D*((?:\d+,? ?)+)")
_IGNORED_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})


@dataclass(frozen=True)
class WorkerFault:
    """An error that ends the run with one message; it travels as data, since an exception would grow a traceback."""

    kind: type[TrichordError]
    message: str


def out_of_memory(error: MemoryError) -> WorkerFault:
    """In a worker that asked for more memory than there is."""
    said = str(error) or "MemoryError"
    return WorkerFault(
        TrichordError, f"a process of the loader ran out of host memory ({current_phase()}): {said}; {_LESS_MEMORY}"
    )


class _StepStream(IterableDataset):
    """What the planner process runs. The rows of its steps are pickled already."""

    def __init__(self, make_planner: Callable[[], StepPlanner]) -> None:
        self._make_planner = make_planner

    def __iter__(self) -> Iterator[tuple[PlannedStep, list[bytes]] | WorkerFault]:
        try:
            for step in self._make_planner().steps():
                set_phase("wait for work")  # as long as nobody asks for the next step
                yield replace(step, rows=()), [pickle.dumps(row, pickle.HIGHEST_PROTOCOL) for row in step.rows]
        except TrichordError as error:
            yield WorkerFault(type(error), str(error))
        except MemoryError as error:
            yield out_of_memory(error)


class _RowDecoding(Dataset):
    """What a decode worker runs. Its index is a pickled row: ours, from the planner process, never from data."""

    def __init__(self, decoder: RowDecoder, slots: RowSlots) -> None:
        self._decoder = decoder
        self._slots = slots

    def __getitem__(self, task: tuple[bytes, int | None] | None) -> Parcel | WorkerFault | None:
        if task is None:
            return None
        row, slot = task
        try:
            return pack_parcel(self._decoder.decode(pickle.loads(row)), self._slots, slot)
        except TrichordError as error:
            return WorkerFault(type(error), str(error))
        except MemoryError as error:
            return out_of_memory(error)
        finally:
            set_phase("wait for work")


def read_in_workers(
    make_planner: Callable[[], StepPlanner],
    decoder: RowDecoder,
    rows_per_step: int,
    num_workers: int,
    prefetch_steps: int,
) -> Iterator[tuple[PlannedStep, list[DecodedRow]]]:
    """Planned steps, without their rows, and the rows decoded, at most `prefetch_steps` ahead of what is asked for.

    Args:
        rows_per_step: about as many rows this rank has in a step; bounds what is decoded ahead.

    Closing the generator ends the processes.

    Raises:
        TrichordError: the first error of a process, of its own class, once all before it was given out.
        RuntimeError: a process died, or met a fault in the code.
    """
    board = PhaseBoard(["planner", *(f"worker {number}" for number in range(num_workers))])
    options = {"batch_size": None, "collate_fn": _as_it_is}
    # fork: a process starts in milliseconds and shares the indices of all shards
    options |= {"multiprocessing_context": "fork", "persistent_workers": True}
    stream = _StepStream(make_planner)
    enter = partial(_enter_on_board, os.getpid(), board)
    planned = _start(
        DataLoader(stream, num_workers=1, prefetch_factor=prefetch_steps, worker_init_fn=partial(enter, 0), **options)
    )
    close_planner = _close_at_exit(planned)
    try:
        open_steps: deque[tuple[PlannedStep, int] | WorkerFault] = deque()
        per_worker = max(1, -(-prefetch_steps * max(1, rows_per_step) // num_workers))
        # Rows under way, those of the step that is being put together, and two steps that the caller may hold.
        slots = RowSlots(num_workers * per_worker + 3 * max(1, rows_per_step))
        tasks = _Tasks(planned, open_steps, slots)
        loader = DataLoader(
            _RowDecoding(decoder, slots),
            sampler=tasks,
            num_workers=num_workers,
            prefetch_factor=per_worker,
            worker_init_fn=partial(enter, 1),
            **options,
        )
        parcels = _start(loader)
        close_decoders = _close_at_exit(parcels)
        try:
            while True:
                opened = open_steps.popleft()
                if isinstance(opened, WorkerFault):
                    raise opened.kind(opened.message)
                step, num_tasks = opened
                found = [_checked(_next(parcels)) for _ in range(num_tasks)]
                yield step, [unpack_parcel(parcel, slots) for parcel in found if parcel is not None]
                del found, opened, step  # or the rows of this step are kept until the next one has come
        finally:
            close_decoders()
    finally:
        close_planner()
        board.close()


class _Tasks:
    """The rows to decode, in order; what is known of their steps goes to `open_steps` on the way.

    A step without rows still has one task, or a rank that has none would look for one for ever.
    """

    def __init__(self, planned: Iterator[Any], open_steps: deque, slots: RowSlots) -> None:
        self._planned = planned
        self._open_steps = open_steps
        self._slots = slots

    def __iter__(self) -> Iterator[tuple[bytes, int | None] | None]:
        while True:
            item = _next(self._planned)
            if isinstance(item, WorkerFault):
                self._open_steps.append(item)
                return
            step, rows = item
            self._open_steps.append((step, max(1, len(rows))))
            for row in rows:
                yield row, self._slots.take()
            if not rows:
                yield None


def _next(iterator: Any) -> Any:
    """What `next` gives, without the profiler range that torch puts around it: 0.3 ms each on a CPU, a tenth of what
    the loader costs in all."""
    try:
        return iterator._next_data()
    except RuntimeError as error:
        if (death := death_of_worker(error)) is None:
            raise  # a fault in the code, with its trace
        raise death from error


def death_of_worker(error: BaseException) -> TrichordError | None:
    """What torch's error that a loader's process is gone means, and at which sample it was; None for other errors.

    torch raises it wherever the main process is at the moment, in a collective, say.
    """
    said = str(error).partition("\n")[0].rstrip(". ")
    if not isinstance(error, RuntimeError) or not re.search(
        r"DataLoader worker.*(killed by signal|exited unexp)", said
    ):
        return None
    pids = [int(pid) for found in _PIDS.findall(said) for pid in re.findall(r"\d+", found)]
    did = "".join(f"{worker.name} did: {worker.phase}. " for worker in worker_phases() if worker.pid in pids)
    return TrichordError(f"a process of the loader has died: {said}. {did}Most often memory ran out: {_LESS_MEMORY}")


def _checked(parcel: Parcel | WorkerFault | None) -> Parcel | None:
    if isinstance(parcel, WorkerFault):
        raise parcel.kind(parcel.message)
    return parcel


def _start(loader: DataLoader) -> Any:
    """Fork the workers with the job's signals held back until each has said how it takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # torch counts cores, the user has chosen
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close_at_exit(iterator: Any) -> Callable[[], Any]:
    """What ends the workers, now or at exit.

    Where nobody closes the generator, multiprocessing's exit would send the SIGTERM that workers ignore and wait for
    them for ever. Its own finalizers run before that, in plain and in forked processes.
    """
    return Finalize(None, _close, args=(iterator,), exitpriority=100)


def _as_it_is(item: Any) -> Any:
    return item


def _enter_on_board(parent_pid: int, board: PhaseBoard, first: int, worker: int) -> None:
    enter_worker(parent_pid, worker)
    board.claim(first + worker)
    with contextlib.suppress(OSError):  # where stderr is no file
        faulthandler.register(DUMP_SIGNAL, file=log_stream())


def enter_worker(parent_pid: int, worker: int) -> None:
    """First thing in a worker: one thread, no share in the job's signals, no life beyond the parent.

    Schedulers and terminals signal the whole process group; the rank decides what to do about it and still needs its
    next batch for that, so its workers do not react.
    """
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    die_with_parent(parent_pid)
    # What was there before the fork is not garbage: looking through all of torch took a quarter of the planner's time,
    # and wrote to pages that are otherwise shared with the parent.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _close(iterator: Any) -> None:
    """End the workers in order; kill those that hang in a read, since they ignore the SIGTERM that torch would send.

    Uses the iterator's private parts: torch has no public way to end it, and none that a hanging worker obeys.
    """
    iterator._workers_done_event.set()
    for queue in iterator._index_queues:
        queue.put(None)
    deadline = time.monotonic() + _CLOSE_SECONDS
    for worker in iterator._workers:
        worker.join(timeout=max(0.0, deadline - time.monotonic()))
    with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler reports what is killed here
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
    iterator._shutdown_workers()
