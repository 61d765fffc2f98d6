"""What every helper process of ours does first."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a user, a scheduler or a closed terminal sends to end a command."""


def enter_worker(parent_pid: int) -> None:
    """A worker dies with its parent, and of a signal without a word: the parent says what there is to say."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored by what a shell script runs in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see stopping.signals_held
    die_with_parent(parent_pid)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, however that dies (Linux, prctl(2)).

    Args:
        parent_pid: as the parent knows itself, since it may be dead already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
