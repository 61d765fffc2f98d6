"""Calls to somebody who may be slow or gone, made one after the other by a thread: whoever asks never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Outbox:
    """Each call deals with its own errors; one that raises ends the thread, and those behind it are not made."""

    def __init__(self, name: str):
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self, timeout_s: float) -> bool:
        """After the last call; waits for what is left. False: it took longer, and goes on in the thread."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
