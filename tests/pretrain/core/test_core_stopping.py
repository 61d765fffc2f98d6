"""Signals that end a command: the words, the exit code, the processes, and what stays as it was."""

import multiprocessing
import os
import signal
import time

import pytest

from trichord.core.processes import enter_worker
from trichord.core.stopping import Stopped, signals_held, signals_kept, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_with_words_and_a_code(number):
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)  # as where no shell has said to ignore it
    try:
        with pytest.raises(Stopped, match="3 of 5 are there") as stopped, stoppable(lambda: "3 of 5 are there"):
            signal.raise_signal(number)
        assert stopped.value.exit_code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(lambda: "stopped"):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("told", "code"), [(signal.SIG_IGN, 0), (signal.default_int_handler, -signal.SIGINT)])
def test_a_worker_ignores_what_its_parent_was_told_to_ignore(told, code):
    """A shell script tells what it runs in the background to ignore Ctrl-C."""
    child = multiprocessing.get_context("fork").Process(target=_work, args=(told, os.getpid()))
    child.start()
    child.join()
    assert child.exitcode == code


def _work(told, parent: int) -> None:
    signal.signal(signal.SIGINT, told)
    enter_worker(parent)
    signal.raise_signal(signal.SIGINT)


def test_processes_are_killed_and_what_breaks_of_it_is_no_error():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    with pytest.raises(Stopped), stoppable(lambda: "stopped"):
        _break_off(child)
    assert child.exitcode == -signal.SIGKILL


def _break_off(child) -> None:
    """As a pool may: what it says of killed processes comes instead of the signal."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        child.join()
        raise OSError("a pipe to the process broke") from None


def test_without_a_signal_errors_pass():
    with pytest.raises(OSError, match="disk full"), stoppable(lambda: "stopped"):
        raise OSError("disk full")


def test_a_held_signal_comes_after_the_block_and_handlers_come_back():
    done: list[str] = []
    with pytest.raises(Stopped), stoppable(lambda: "stopped"):
        _start_something(done)
    assert done == ["whole"]


def _start_something(done: list[str]) -> None:
    with signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library may
    with signals_held():
        signal.raise_signal(signal.SIGTERM)
        done.append("whole")
    done.append("never")
