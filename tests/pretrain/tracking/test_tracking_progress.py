"""Progress: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

import io
import logging
import re

import pytest
from rich.console import Console

from trichord.core.log import configure_logging
from trichord.tracking.progress import Progress, describe, duration, quantity, work_progress


def plain():
    return Console(file=io.StringIO(), force_terminal=False)


def test_plain_lines_where_there_is_no_terminal(log_lines):
    console = plain()
    progress = Progress(400, first_step=100, console=console)
    progress.advance(119)
    progress.update(120, {"train/loss": 1.23456, "speed/tokens_per_s": 12_345.0})
    progress.close()
    assert len(log_lines()) == 1
    assert log_lines()[0].startswith("step 120/400  loss 1.235  12.3k tokens/s  eta ")
    assert console.file.getvalue() == ""


def test_a_bar_on_a_terminal_with_logs_above_it(log_lines, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    configure_logging()
    console = Console(file=screen, force_terminal=True, width=100)
    progress = Progress(400, label="digits", console=console)
    progress.update(200, {"train/loss": 2.0, "speed/tokens_per_s": 5e6})
    logging.getLogger("trichord.test").warning("from the log")
    progress.close()
    progress.close()
    logging.getLogger("trichord.test").warning("afterwards")
    text = screen.getvalue()
    for part in ("digits", "200/400", "loss 2", "5M tokens/s", "from the log", "afterwards"):
        assert part in text
    assert "step 200/400" not in text, "no plain line beside the bar"


@pytest.mark.parametrize(("width", "figures"), [(50, "loss 2.123"), (60, "loss 2.123  5M tokens/s"), (30, "")])
def test_a_narrow_terminal_keeps_the_count_and_the_time_left(width, figures):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = Progress(400, label="digits", console=console)
    progress.update(200, {"train/loss": 2.1234, "speed/tokens_per_s": 5e6, "speed/mfu_frac": 0.4})
    progress.close()
    last = [line for line in re.split(r"[\r\n]", console.file.getvalue()) if "200/400" in line][-1]
    assert re.search(rf"200/400 {figures} ?(-:--:--|--:--|[0-9:]{{5,}})", last), last
    assert ("tokens/s" in last) == ("tokens/s" in figures)
    assert "MFU" not in last


def test_other_ranks_show_nothing(log_lines):
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(400, visible=False, console=console)
    progress.update(10, {"train/loss": 2.0})
    progress.close()
    assert not log_lines()
    assert console.file.getvalue() == ""


def test_time_left_counts_only_the_steps_of_this_start(log_lines, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("trichord.tracking.progress.time.monotonic", lambda: clock[0])
    progress = Progress(400, first_step=300, console=plain())
    clock[0] = 50.0
    progress.update(350, {})
    assert log_lines()[0].endswith("eta 50s")


def test_work_progress_is_sparse_without_a_terminal(log_lines):
    with work_progress("indexing shards", 1000, console=plain()) as advance:
        for _ in range(1000):
            advance(1)
    assert log_lines() == ["indexing shards: 1000/1000"]


def test_work_progress_draws_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with work_progress("indexing shards", 4, console=console) as advance:
        advance(4)
    assert "indexing shards" in console.file.getvalue()
    assert "100%" in console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (987, "987"), (999.6, "1k"), (12_345, "12.3k"), (4.56e6, "4.56M"), (7e12, "7T")]
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(41, "41s"), (59.7, "1m00s"), (200, "3m20s"), (18_425, "5h07m"), (183_600, "2d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_missing_figures_are_left_out():
    assert describe({"train/grad_norm": 1.0}) == ""
    assert describe({"train/loss": float("nan")}) == "loss nan"


def test_the_best_figure_of_speed_is_shown():
    speed = {"train/loss": 2.0, "speed/tokens_per_s": 5e6, "speed/flops_per_s": 3.2e14}
    assert describe(speed) == "loss 2  5M tokens/s  320TFLOP/s"
    assert describe({**speed, "speed/mfu_frac": 0.4123}) == "loss 2  5M tokens/s  MFU 41.2 %"
