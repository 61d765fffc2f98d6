"""Peak memory of a piece of work: on a CPU in a fresh process, on a GPU by torch's own count."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from trichord_kernels.errors import KernelError


def peak_mib(make: Callable[..., Callable[[], object]], *args: object) -> float:
    """MiB that one run takes at its peak above what stood before it, resident memory, in a fresh process.

    `make(*args)` builds the inputs and returns the run, so that inputs do not count and everything the run allocates
    does: activations, gradients, results. It goes to the process by name: a function of a module, arguments picklable.
    Have `make` do a tiny run first, if buffers that libraries allocate once are not to count. Linux only.

        def dense_run(rows: int) -> Callable[[], object]:
            x = torch.randn(rows, 64, requires_grad=True)
            return lambda: (x @ x.T).logsumexp(1).sum().backward()

        peak_mib(dense_run, 8192)   # about 4 x 256 MiB
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make, args))
    process.start()
    sender.close()
    try:
        peak_kib = receiver.recv()
    except EOFError as error:
        process.join()
        raise KernelError(
            f"peak memory of {make.__name__}: expected a figure from the process, got exit code {process.exitcode}; "
            "its error stands above"
        ) from error
    process.join()
    return round(peak_kib / 1024, 1)


def gpu_peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """MiB that torch's allocator hands out at the peak of one run above what stood before it. Not yet run on a GPU."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def _measure(sender: Connection, make: Callable[..., Callable[[], object]], args: tuple) -> None:
    run = make(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status_kib("VmRSS")
    run()
    sender.send(_status_kib("VmHWM") - before)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
