"""One measurement of one pipeline, in a process of its own: `python -m trichord.benchmarks.data_measure REQUEST`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from trichord.benchmarks.data_corpus import Corpus
from trichord.core.errors import DataError

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Request:
    """What to measure. warm_batches: given before the clock starts; epochs: for memory, 0: speed only."""

    name: str
    workers: int
    warm_batches: int
    batches: int
    epochs: int
    corpus: dict


@dataclass(frozen=True)
class Measurement:
    """wall_us, cpu_us: per sample in the steady state, CPU of all processes; first_batch_s: from opening the pipeline.

    pss_mib: largest proportional set size of a worker over each epoch, empty where no memory was asked for.
    """

    wall_us: float
    cpu_us: float
    first_batch_s: float
    pss_mib: list[float]


def measure(request: Request) -> Measurement:
    """Run the request in a fresh interpreter, on one thread per process.

    Raises:
        DataError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "trichord.benchmarks.data_measure", json.dumps(asdict(request))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False, env=env)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"the benchmark of {request.name!r} did not end within {_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise DataError(f"the benchmark of {request.name!r} failed: {done.stderr.strip()[-1500:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _run(request: Request) -> Measurement:
    import torch

    from trichord.benchmarks.data_contestants import BATCH, CONTESTANTS

    torch.set_num_threads(1)
    corpus = Corpus(**request.corpus)
    started = time.perf_counter()
    batches = CONTESTANTS[request.name](corpus, request.workers)
    next(batches)
    first_batch_s = time.perf_counter() - started
    for _ in range(request.warm_batches - 1):
        next(batches)
    pss: list[float] = []
    for _ in range(request.epochs):
        largest = 0.0
        for _ in range(-(-corpus.num_samples // BATCH)):
            next(batches)
            largest = max([largest, *(_pss_mib(pid) for pid in _children(os.getpid()))])
        pss.append(largest)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(request.batches):
        next(batches)
    samples = max(1, request.batches * BATCH)
    wall_us = (time.perf_counter() - wall) / samples * 1e6
    cpu_us = (_cpu_seconds() - cpu) / samples * 1e6
    if hasattr(batches, "close"):
        batches.close()
    return Measurement(wall_us, cpu_us, first_batch_s, pss)


def _cpu_seconds() -> float:
    """CPU time of this process and all below it that are alive."""
    return sum(_process_seconds(pid) for pid in [os.getpid(), *_children(os.getpid())])


def _process_seconds(pid: int) -> float:
    """To the nanosecond where the kernel counts so, else to its tick of 10 ms."""
    try:
        threads = Path(f"/proc/{pid}/task")
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e9
    except OSError:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system


def _children(pid: int) -> list[int]:
    """All living processes below `pid`."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    print(json.dumps(asdict(_run(Request(**json.loads(sys.argv[1]))))), flush=True)
    os._exit(0)  # what a pipeline needs to end is not measured here
