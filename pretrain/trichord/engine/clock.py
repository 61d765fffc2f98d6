"""Where the time of a step goes: the parts follow each other without gaps, so they add up to the whole.

On a GPU an event is queued where a part begins, and the times between events are read later, when they are over: nobody
waits for the device to know them. The host waits for the device once a step anyway, for the gradient norm; so a part
in which the device has nothing to do, such as waiting for data, has its true length between events too.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from trichord.core.phase import set_phase


class StepClock:
    """Says which part of a step begins, to whoever watches this process (`core.phase`), and adds up how long each took.

    The time before the first part, and of parts that nobody names when reading, belongs to nobody.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0
        self._open: deque[tuple[str, Any]] = deque()  # parts begun, with their events, oldest first
        self._unused: list[Any] = []

    def enter(self, part: str, **facts: Any) -> None:
        """From here on it is `part`; facts go to the watcher alone. Costs microseconds and never waits."""
        set_phase(part, **facts)
        if self._on_device:
            self._mark(part)
            return
        now = time.perf_counter()
        if self._part is not None:
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def read(self) -> dict[str, float]:
        """Part -> seconds since the last reading. Between two steps: on a GPU it waits for what is queued."""
        if self._on_device and self._open:
            self._mark(self._open[-1][0])
            self._open[-1][1].synchronize()
            self._settle()
        elif self._part is not None:
            now = time.perf_counter()
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
            self._since = now
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _mark(self, part: str) -> None:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        self._open.append((part, event))
        if len(self._open) >= 512:  # a long window: take in what is over, so that events do not pile up
            self._settle()

    def _settle(self) -> None:
        """Add up the parts whose end the device has passed."""
        while len(self._open) > 1 and self._open[1][1].query():
            part, begun = self._open.popleft()
            milliseconds = begun.elapsed_time(self._open[0][1])
            self._seconds[part] = self._seconds.get(part, 0.0) + milliseconds / 1000.0
            self._unused.append(begun)
