"""One rank of `trichord bench step`: `python -m trichord.benchmarks.step_rank REQUEST`, with torchrun's environment.

Prints, as JSON, the CPU seconds of each step of each contestant (for the ragged texts: per useful token).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from trichord.benchmarks.step import WARM_STEPS, StepRequest
from trichord.benchmarks.step_contestants import build_contestants
from trichord.benchmarks.step_ragged import measure_ragged


def measure(request: StepRequest) -> dict[str, list[float]]:
    """Contestants take one step each per round, in an order that turns from round to round."""
    torch.set_num_threads(1)
    contestants = build_contestants(request)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number, order in enumerate(_orders(list(contestants), WARM_STEPS + request.pairs)):
        for name in order:
            dist.barrier()  # nobody pays for another's contestant
            started = time.process_time()
            contestants[name](number)
            if number >= WARM_STEPS:
                seconds[name].append(time.process_time() - started)
    return seconds


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    for number in range(rounds):
        turn = number % len(names)
        yield names[turn:] + names[:turn]


if __name__ == "__main__":
    request = StepRequest(**json.loads(sys.argv[1]))
    found = measure_ragged(request) if "trainer" in request.contestants else measure(request)
    print(json.dumps(found), flush=True)
    os._exit(0)  # gloo's threads need not end in order
