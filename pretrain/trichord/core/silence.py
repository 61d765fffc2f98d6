"""Decoders in C that print to standard error whatever they find odd in a file, without saying in which."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator

_here_too = False


@contextlib.contextmanager
def decoders_silenced() -> Iterator[None]:
    """Let what a decoder prints go nowhere, in worker processes: they have one thread, so nothing else is lost with it.
    In a process of several threads standard error is left as it is, unless it has asked for silence."""
    if multiprocessing.parent_process() is None and not _here_too:
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def silence_here_too() -> Iterator[None]:
    """Have `decoders_silenced` count in this process as in a worker: what is wrong with a file is told in other words,
    and no other thread prints anything that matters."""
    global _here_too
    before, _here_too = _here_too, True
    try:
        yield
    finally:
        _here_too = before
