"""Steps to the device one ahead: while a step computes, the next one is read, pinned and copied."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import torch
from torch import Tensor

from trichord.batches.loader import StepBatch
from trichord.batches.packed_batch import PackedBatch


def move_ahead(steps: Iterator[StepBatch], device: torch.device) -> Iterator[StepBatch]:
    """The same steps, their micro-batches on `device`.

    On a GPU a thread takes the next step from the loader, pins it and copies it on a stream of its own while the caller
    works on the one before; the loader is one step further than what is handed out (`StepBatch.state` is not). On a CPU
    there is nothing to copy, and a thread would only take time from the caller.
    """
    if device.type != "cuda":
        yield from steps
        return
    stream = torch.cuda.Stream(device)

    def fetch() -> tuple[StepBatch, torch.Event]:
        step = next(steps)
        with torch.cuda.stream(stream):
            moved = tuple(batch.pin_memory().to(device) for batch in step.micro_batches)
            return replace(step, micro_batches=moved), stream.record_event()

    with ThreadPoolExecutor(1, "move-ahead") as pool:
        ahead = pool.submit(fetch)
        while True:
            step, copied = ahead.result()
            ahead = pool.submit(fetch)
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for batch in step.micro_batches:
                _keep_for(batch, current)
            yield step


def _keep_for(batch: PackedBatch, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that memory of the copying stream is in use on this one until what is queued now is done."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value.record_stream(stream)
