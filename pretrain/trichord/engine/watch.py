"""Stopping and faults. A signal only sets a flag; a thread watches the other ranks and leaves when one is gone.

Ranks save only after all have agreed on the flag in a completed collective (it travels with the step's counts). A rank
that dies cannot agree: its peers would wait in a collective until the timeout. Each rank's watcher therefore beats in
the job's store and looks at its neighbour's beat; one that is missing for too long ends this process at once, without
saving, and leaves a note that all other watchers read.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from trichord.core.dist import rank_facts
from trichord.core.log import get_logger

log = get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BEAT_EVERY_S = 1.0


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; read by the training loop. Installing it twice is harmless."""

    def __init__(self):
        self._received: int | None = None

    def install(self) -> StopFlag:
        """Take over the signals of this process. Only the main thread may call this."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame) -> None:
        self._received = number  # nothing else: handlers run between any two bytecodes

    @property
    def is_set(self) -> bool:
        return self._received is not None

    @property
    def name(self) -> str:
        return signal.Signals(self._received).name if self._received else "a signal on another rank"


class PeerWatch:
    """Leaves the process when another rank is gone.

    Each rank watches only the next one (so the store sees 2 requests per rank and second, at any world size) and a
    common key `fault`, in which the first that notices names the rank that is missing.
    """

    def __init__(self, timeout_s: float, on_fault: Callable[[str], None], exit_code: int = 1):
        self.timeout_s = timeout_s
        self.on_fault = on_fault
        self.exit_code = exit_code
        self._facts = rank_facts()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> PeerWatch:
        """Start the thread; does nothing in a job of one rank."""
        if self._facts.world_size > 1:
            # A connection of its own: the process group's may be blocked in a wait when it is needed.
            self._store = dist.PrefixStore("trichord_watch", _connect_store(self.timeout_s))
            self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End of the run: beats stop without anyone taking it for a death (all ranks call this after a barrier)."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        peer = (self._facts.rank + 1) % self._facts.world_size
        last_beat, last_change, count = b"", time.monotonic(), 0
        while not self._stopping.wait(BEAT_EVERY_S):
            count += 1
            try:
                self._store.set(f"beat/{self._facts.rank}", str(count))
                if self._store.check(["fault"]):
                    return self._leave(self._store.get("fault").decode())
                beat = self._store.get(f"beat/{peer}") if self._store.check([f"beat/{peer}"]) else b""
            except Exception as error:  # the store lives in another process of the job, which is gone
                if not self._stopping.is_set():
                    self._leave(
                        f"the job's store does not answer any more ({type(error).__name__}): its host process died"
                    )
                return
            now = time.monotonic()
            if beat != last_beat:
                last_beat, last_change = beat, now
            elif now - last_change > self.timeout_s:
                reason = f"rank {peer} has shown no sign of life for {self.timeout_s:.0f} s"
                self._note_fault(reason)
                return self._leave(reason)

    def _note_fault(self, reason: str) -> None:
        try:
            self._store.set("fault", reason)
        except Exception:
            log.warning("could not tell the other ranks: %s", reason)

    def _leave(self, reason: str) -> None:
        if self._stopping.is_set():
            return
        log.error("leaving without saving: %s", reason)
        try:
            self.on_fault(reason)
        finally:
            os._exit(self.exit_code)  # the main thread may be stuck in a collective that can never complete


def _connect_store(timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=max(5.0, timeout_s)),
    )
