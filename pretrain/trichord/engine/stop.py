"""Stopping on a signal, which only sets a flag: it travels with the step's counts, and all ranks stop at one step."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_RANK_UNIT = 2.0**-32
"""Sums over 65,536 ranks stay below 1, and exact in fp64."""


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or a closed terminal's SIGHUP; read by the training loop. Installing it twice is
    harmless."""

    def __init__(self):
        self._received: int | None = None

    def install(self) -> StopFlag:
        """Take over the signals of this process, but for a SIGHUP that is ignored (nohup). Only the main thread may."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame) -> None:
        # Nothing that takes a lock: handlers run between any two bytecodes.
        if self._received is not None:
            name = signal.Signals(number).name
            with suppress(OSError):
                os.write(2, f"{name}: stopping already, with a checkpoint; kill -9 ends it without one\n".encode())
        self._received = self._received or number

    @property
    def is_set(self) -> bool:
        return self._received is not None

    @property
    def name(self) -> str | None:
        """Of the signal; None where this process has had none."""
        return signal.Signals(self._received).name if self._received else None

    def vote(self, rank: int) -> float:
        """What this rank adds to the step's count `stop`: 1 where a signal has come, and a little more that says which
        rank it is."""
        return 1 + rank * _RANK_UNIT if self.is_set else 0.0

    def told(self, votes: float) -> str | None:
        """Why all ranks stop now: the signal, or the rank that had one. votes: the sum over ranks; None: they go on."""
        if votes < 1:
            return None
        if self.name is not None:
            return self.name
        ranks, rest = divmod(votes, 1)
        return f"a signal on rank {rest / _RANK_UNIT:.0f}" if ranks == 1 else f"a signal on {ranks:.0f} other ranks"
