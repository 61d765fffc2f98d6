"""What processes say of themselves: nested, by thread, across a fork, and while it is being written."""

import os
import threading
import time

import pytest

from trichord.core.phase import PhaseBoard, current_phase, note, notes, other_phases, phase, set_phase, worker_phases


@pytest.fixture(autouse=True)
def _before():
    set_phase("before")


def test_a_phase_ends_where_its_block_ends():
    with phase("read", shard="a.tar", member="1.png"):
        assert str(current_phase()) == "read, shard a.tar, member 1.png"
    assert str(current_phase()) == "before"


def test_after_an_exception_the_phase_it_came_from_is_still_there():
    with pytest.raises(ValueError), phase("read", shard="a.tar"):
        raise ValueError
    assert str(current_phase()) == "read, shard a.tar"


def test_going_back_counts_as_a_move():
    since = current_phase().since
    with phase("read"):
        pass
    assert current_phase().since > since


def test_threads_do_not_speak_for_the_main_thread():
    said, done = threading.Event(), threading.Event()

    def work():
        set_phase("copy", step=3)
        said.set()
        done.wait()

    thread = threading.Thread(target=work, name="mover")
    thread.start()
    said.wait()
    assert str(other_phases()["mover"]) == "copy, step 3"
    assert str(current_phase()) == "before"
    done.set()
    thread.join()
    assert "mover" not in other_phases()


def test_notes_stay_over_phases():
    note(step=4)
    note(modalities="image")
    set_phase("update")
    assert notes()["step"] == 4
    assert notes()["modalities"] == "image"


def in_child(action) -> None:
    """Run `action` in a forked process and wait for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_a_forked_process_is_read_through_its_line_even_when_it_is_dead():
    board = PhaseBoard(["planner", "worker 0"])

    def child():
        board.claim(1)
        set_phase("decode", member="ü=1.png", shard="x" * 2000)

    in_child(child)
    planner, worker = board.read()
    assert (planner.pid, planner.phase) == (0, None)
    assert worker.pid > 0
    assert worker.phase.name == "decode"
    assert worker.phase.facts["member"] == "ü=1.png"
    assert worker.phase.since <= current_phase().since + 60
    assert board.read() == [w for w in worker_phases() if w.name in ("planner", "worker 0")][-2:]
    board.close()


def test_a_forked_process_has_not_said_what_its_parent_said():
    board = PhaseBoard(["child"])

    def child():
        inherited = current_phase()
        board.claim(0)
        set_phase("inherited nothing" if inherited is None else "inherited")

    in_child(child)
    assert board.read()[0].phase.name == "inherited nothing"
    board.close()


def test_what_is_read_while_it_is_written_is_whole():
    board = PhaseBoard(["writer"])
    pid = os.fork()
    if pid == 0:
        board.claim(0)
        while os.getppid() != 1:
            for letter in "abcdefgh":
                set_phase(letter * 900, same=letter)
    try:
        seen, reads, deadline = set(), 0, time.monotonic() + 30
        while reads < 3000 or (len(seen) < 2 and time.monotonic() < deadline):  # a busy machine may let one run long
            reads += 1
            said = board.read()[0].phase
            if said is not None and "same" in said.facts:
                assert said.name == said.facts["same"] * 900
                seen.add(said.facts["same"])
        assert len(seen) > 1
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        board.close()
