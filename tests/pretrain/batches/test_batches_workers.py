"""Worker processes: deaf to the job's signals, gone with their parent, no obstacle to leaving."""

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest

from trichord.batches import workers as workers_module
from trichord.core.errors import TrichordError
from trichord.samples import sample as sample_module

WORKERS = get_context("fork")
"""Forked from this process: torch is there already."""


def run_rank(corpus, commands) -> None:
    """A rank with a loader of two workers, which it never closes."""
    steps = iter(corpus.loader(num_workers=2))
    next(steps)
    commands.send([child.pid for child in active_children()])
    while commands.recv() == "go on":
        state = [next(steps).state for _ in range(30)][-1]
        commands.send(state.step)


@pytest.fixture
def rank(corpus):
    """The rank's process, a pipe to it, and its workers' pids."""
    ours, theirs = WORKERS.Pipe()
    process = WORKERS.Process(target=run_rank, args=(corpus, theirs))
    process.start()
    assert ours.poll(60)
    workers = ours.recv()
    assert len(workers) == 3, "one plans, two decode"
    yield process, ours, workers
    process.kill()
    process.join()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids, seconds) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_signals_of_the_job_do_not_reach_workers(rank):
    process, commands, workers = rank
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        for worker in workers:
            os.kill(worker, number)
    commands.send("go on")
    assert commands.poll(60)
    assert commands.recv() == 31
    assert all(alive(worker) for worker in workers)
    process.kill()
    assert gone_within(workers, 2), "workers outlive a parent that was killed"


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_that_is_killed_is_one_message(corpus, number):
    """Number 0 plans, 1 decodes."""
    with closing(corpus.loader(num_workers=1)) as loader:
        steps = iter(loader)
        next(steps)
        before = {child.pid for child in active_children()}
        os.kill(sorted(before)[number], signal.SIGKILL)
        with pytest.raises(TrichordError, match=r"a process of the loader has died.*lower batches\.num_workers"):
            list(itertools.islice(steps, 1000))


def test_a_rank_that_forgets_to_close_leaves_at_once(rank):
    process, commands, workers = rank
    commands.send("leave")
    process.join(timeout=15)
    assert process.exitcode == 0
    assert gone_within(workers, 1)


PROGRAM = """
import sys
from pathlib import Path
from batches_corpus import Corpus
loader = Corpus(Path(sys.argv[1]), sys.argv[2], Path(), 0, frozenset(), 0).loader(num_workers=1)
steps = iter(loader)
next(steps)
"""


@pytest.mark.slow
def test_a_program_that_forgets_to_close_leaves_at_once(corpus):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROGRAM, str(corpus.root), corpus.tokenizer]
    subprocess.run(command, check=True, timeout=60, env=environment)


def test_a_worker_that_hangs_does_not_keep_the_loader_from_closing(corpus, monkeypatch):
    monkeypatch.setattr(workers_module, "_CLOSE_SECONDS", 0.3)
    loader = corpus.loader(num_workers=1, prefetch_steps=12)
    real, calls, hangs = sample_module.read_ref, itertools.count(), WORKERS.Event()

    def hanging(shard, ref, max_bytes):
        # The first step decodes fewer, those read ahead more; the planner reads texts only.
        if ref.ext not in ("txt", "json") and next(calls) > 40:
            hangs.set()
            time.sleep(60)
        return real(shard, ref, max_bytes)

    monkeypatch.setattr(sample_module, "read_ref", hanging)
    next(iter(loader))
    assert hangs.wait(60)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
