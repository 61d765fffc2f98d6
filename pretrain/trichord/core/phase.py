"""What a process is doing right now: a name, a few facts, and since when. Written by the code that does it.

A watcher reads it when nothing moves any more: "decode, key 000123, shard s3://b/x-0007.tar, for 40 s". Saying it costs
about a microsecond, so it may be said for every sample; nothing is said to a device and nothing is locked.

    set_phase("update")                        until the next one
    with phase("read", shard=url):             then what was before; an exception leaves it as it is
    note(step=12, modalities="image text")     facts that outlive the phase

A process that was forked from this one writes to a line of shared memory instead (`PhaseBoard`), and this one reads it.
No torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_LINE_BYTES = 1024
_HEAD = struct.Struct("<QqdH")  # version, odd while it is being written; process id; since; bytes of text
_VERSION = struct.Struct("<Q")
_TEXT_BYTES = _LINE_BYTES - _HEAD.size
_SEPARATOR = "\x1f"
_now, _thread = time.monotonic, threading.get_ident  # looked up once: this runs for every member that is read


class Phase(NamedTuple):
    """since: `time.monotonic()` when it began, on Linux one clock for all processes of a machine."""

    name: str
    facts: Mapping[str, Any]
    since: float

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.since

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{name.replace('_', ' ')} {value}" for name, value in self.facts.items())])


_phases: dict[int, Phase] = {}
"""By thread. Only the thread itself writes its entry."""
_notes: dict[str, Any] = {}
_boards: list[PhaseBoard] = []
_line: _Line | None = None
"""Where this process says it to the one that forked it."""


def set_phase(name: str, **facts: Any) -> None:
    """This thread now does `name`, until it says something else."""
    _enter(Phase(name, facts, _now()))


class phase:  # noqa: N801  (reads as a verb at the place of use)
    """`set_phase` for the length of a `with`; then what was before goes on. An exception leaves it as it is."""

    __slots__ = ("_before", "_facts", "_name")

    def __init__(self, name: str, **facts: Any) -> None:
        self._name = name
        self._facts = facts

    def __enter__(self) -> None:
        self._before = _phases.get(threading.get_ident())
        _enter(Phase(self._name, self._facts, time.monotonic()))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._before is None:
            _phases.pop(threading.get_ident(), None)
        else:
            _enter(self._before._replace(since=time.monotonic()))


def note(**facts: Any) -> None:
    """Facts about this process that stay until they are said anew, such as the step."""
    _notes.update(facts)


def notes() -> dict[str, Any]:
    return dict(_notes)


def current_phase() -> Phase | None:
    """What the main thread does; None: it has not said."""
    return _phases.get(threading.main_thread().ident or 0)


def other_phases() -> dict[str, Phase]:
    """What the other threads of this process do, by name of the thread."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    return {names[ident]: said for ident, said in list(_phases.items()) if ident != main and ident in names}


class Worker(NamedTuple):
    """A process forked from this one. pid: 0 if it has not begun."""

    name: str
    pid: int
    phase: Phase | None


class PhaseBoard:
    """Lines of memory, one for each process that will be forked, in which these say what they do.

    Reading takes nothing from the writer: a line has a version that is odd while it is written.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._memory = mmap.mmap(-1, _LINE_BYTES * len(names))  # anonymous and shared: what is forked sees it
        _boards.append(self)

    def claim(self, number: int) -> None:
        """In a forked process: what it does is said in line `number` from now on."""
        global _line
        _line = _Line(self._memory, number * _LINE_BYTES)
        set_phase("start")

    def read(self) -> list[Worker]:
        return [self._read(number) for number in range(len(self._names))]

    def close(self) -> None:
        if self in _boards:
            _boards.remove(self)

    def _read(self, number: int) -> Worker:
        at, name = number * _LINE_BYTES, self._names[number]
        for _ in range(100):
            version, pid, since, size = _HEAD.unpack(self._memory[at : at + _HEAD.size])
            text = self._memory[at + _HEAD.size : at + _HEAD.size + size]
            if version % 2 == 0 and version == _VERSION.unpack(self._memory[at : at + 8])[0]:
                said, *facts = text.decode("utf-8", errors="replace").split(_SEPARATOR)
                pairs = dict(fact.split("=", 1) for fact in facts if "=" in fact)
                return Worker(name, pid, Phase(said, pairs, since) if pid else None)
        return Worker(name, pid, None)  # it died while it was writing


def worker_phases() -> list[Worker]:
    """What the processes forked from this one do, as far as they have a line on a board that is not closed."""
    return [worker for board in list(_boards) for worker in board.read()]


def _enter(now: Phase) -> None:
    _phases[_thread()] = now
    if _line is not None:
        _line.write(now)


class _Line:
    """A line of a board, as the process that writes it has it."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self._at, self._pid, self._version = memory, at, os.getpid(), 1

    def write(self, now: Phase) -> None:
        text = now.name
        for name, value in now.facts.items():
            text += f"{_SEPARATOR}{name}={value}"
        data = text.encode("utf-8", "replace")[:_TEXT_BYTES]
        at, size, version = self._at, len(data), self._version
        # By itself and first: a long copy has no order. Copied and not packed in place, which would set it to 0 first.
        self._memory[at : at + 8] = _VERSION.pack(version)
        self._memory[at : at + _HEAD.size + size] = _HEAD.pack(version, self._pid, now.since, size) + data
        self._memory[at : at + 8] = _VERSION.pack(version + 1)
        self._version = version + 2


def _forget_parent() -> None:
    """A forked process has said nothing yet."""
    global _line
    _line = None
    _phases.clear()
    _notes.clear()
    _boards.clear()


os.register_at_fork(after_in_child=_forget_parent)
