"""Runs a function on several ranks for a test: real processes, gloo, forked from a server that has imported torch and
DeepSpeed once, so that a case costs a second instead of half a minute."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The fork server looks for the module to import on its own path, and says nothing where it does not find it.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm_imports"])


class RankError(AssertionError):
    """A rank raised, died, or did not end in time. `failures`: rank -> what it said ("timeout", "exit -9", text)."""

    def __init__(self, failures: dict[int, str]):
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        self.failures = failures


class Ranks:
    """Ranks that are running: `pids` in rank order, for signals; `wait` for their results."""

    def __init__(self, world_size: int, target: Callable[..., Any], *args: Any):
        self.world_size = world_size
        self._queue = _CONTEXT.SimpleQueue()
        port = _free_port()
        self._processes = [
            _CONTEXT.Process(target=_rank_main, args=(rank, world_size, port, self._queue, target, args))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait(self, timeout_s: float = 120.0) -> tuple[dict[int, Any], dict[int, str]]:
        """(results, failures) by rank; whoever has not ended by then is killed and counts as "timeout"."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) + len(failures) < self.world_size and time.monotonic() < deadline:
            ended = [rank for rank, process in enumerate(self._processes) if not process.is_alive()]
            while not self._queue.empty():
                rank, ok, value = self._queue.get()
                (results if ok else failures)[rank] = value
            for rank in set(ended) - set(results) - set(failures):
                failures[rank] = f"exit {self._processes[rank].exitcode}"
            time.sleep(0.02)
        for rank, process in enumerate(self._processes):
            if rank not in results and rank not in failures:
                failures[rank] = "timeout"
            process.join(timeout=5 if rank in results else 0.1)
            if process.is_alive():
                process.kill()  # a process this object started
                process.join()
        return results, failures


def run_ranks(world_size: int, target: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`target(*args)` on every rank, with torchrun's environment; returns the results in rank order.

    Raises:
        RankError: at least one rank did not return.
    """
    results, failures = Ranks(world_size, target, *args).wait(timeout_s)
    if failures:
        raise RankError(failures)
    return [results[rank] for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, queue: Any, target: Callable[..., Any], args: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, True, target(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc(limit=-6)))
    os._exit(0)  # no teardown: gloo threads of a failed case may never end
