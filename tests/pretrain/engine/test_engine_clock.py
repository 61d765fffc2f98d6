"""Parts of a step: they follow each other without gaps, on the host's clock and on a device's events."""

import time
from typing import ClassVar

import pytest
import torch

from trichord.core.phase import current_phase
from trichord.engine import clock as clock_module
from trichord.engine.clock import StepClock


@pytest.fixture
def ticks(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_parts_add_up(ticks):
    clock = StepClock(torch.device("cpu"))
    for part, seconds in (("data wait", 1.0), ("forward", 2.0), ("backward", 4.0), ("forward", 8.0), ("record", 16.0)):
        clock.enter(part)
        ticks[0] += seconds
    assert clock.read() == {"data wait": 1.0, "forward": 10.0, "backward": 4.0, "record": 16.0}
    ticks[0] += 32.0  # what goes on belongs to the next reading
    assert clock.read() == {"record": 32.0}


def test_a_watcher_reads_the_same_words(ticks):
    StepClock(torch.device("cpu")).enter("forward", micro_step=3)
    said = current_phase()
    assert (said.name, said.facts) == ("forward", {"micro_step": 3})


class Event:
    """As torch.cuda.Event: over once the device has got there, which is when the test says so."""

    clock: ClassVar = [0.0]
    reached: ClassVar = [0.0]
    waits: ClassVar = [0]
    made: ClassVar = [0]

    def __init__(self, enable_timing):
        assert enable_timing
        self.made[0] += 1

    def record(self):
        self.at = self.clock[0]

    def query(self):
        return self.at <= self.reached[0]

    def synchronize(self):
        self.waits[0] += 1
        self.reached[0] = max(self.reached[0], self.at)

    def elapsed_time(self, other):
        assert self.query()
        assert other.query(), "asking for a time that is not over would wait"
        return 1000.0 * (other.at - self.at)


def test_a_device_is_asked_for_times_only_when_they_are_read(monkeypatch):
    monkeypatch.setattr(clock_module.torch.cuda, "Event", Event)
    Event.clock[0] = Event.reached[0] = 0.0
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        for part in ("data wait", "forward", "backward"):
            clock.enter(part)
            Event.clock[0] += {"data wait": 1.0, "forward": 2.0, "backward": 4.0}[part]
    assert Event.waits == [0]
    assert clock.read() == {"data wait": 3.0, "forward": 6.0, "backward": 12.0}
    assert Event.waits == [1]


def test_events_of_a_long_window_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(clock_module.torch.cuda, "Event", Event)
    Event.clock[0] = Event.reached[0] = Event.waits[0] = Event.made[0] = 0
    clock = StepClock(torch.device("cuda"))
    for _ in range(5000):
        clock.enter("forward")
        Event.clock[0] += 1.0
        Event.reached[0] = Event.clock[0] - 10.0  # the device is a little behind
    assert Event.waits == [0]
    assert Event.made[0] < 600
    assert clock.read() == {"forward": 5000.0}
