"""Stopping a command that works for long: a signal ends it with one line, its exit code and no process left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType

from trichord.core.errors import TrichordError
from trichord.core.processes import STOP_SIGNALS

_SAME_STOP_S = 5.0
"""Signals that follow each other faster are one wish to stop: Ctrl-C and `timeout` reach a process more than once."""


class Stopped(TrichordError):  # noqa: N818  no error
    """The command was stopped by a signal; the message says what is there, the exit code is a shell's: 128 + signal."""

    def __init__(self, words: str, number: int):
        super().__init__(words)
        self.exit_code = 128 + number


class _Signalled(KeyboardInterrupt):
    """What a signal raises in the middle of the work; no `except Exception` holds it up."""


@contextmanager
def stoppable(words: Callable[[], str]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the block: processes that multiprocessing started are killed, `Stopped` is raised.

    Args:
        words: says what is there now and what to do, for the message; called when the work has ended.

    Outside of the main thread, which alone gets signals, nothing changes; a signal that is ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop()
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.on_signal) for number in handled}
    try:
        yield
    except BaseException:
        if stop.number is None:
            raise
        raise Stopped(words(), stop.number) from None  # also where the killed processes are what the work noticed first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Puts back the handlers of a block whose library sets its own."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals to stop wait until the block has ended: it starts processes, and half a start would end in a traceback.

    These begin with the signals held, too, until `enter_worker`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stop:
    """number: of the signal that came, if one did."""

    def __init__(self):
        self.number: int | None = None
        self._came_s = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Later ones are heeded again: the first may have been raised where Python drops exceptions (`__del__`)."""
        again = self.number is not None and time.monotonic() - self._came_s < _SAME_STOP_S
        if again:
            return
        self.number, self._came_s = number, time.monotonic()
        for child in active_children():  # else a pool would wait for what they are at
            child.kill()
        raise _Signalled
