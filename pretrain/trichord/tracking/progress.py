"""What a person watching a run sees: a progress bar on a terminal, plain lines anywhere else. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console

from trichord.core.log import get_logger

_logger = get_logger(__name__)
_TIME_LEFT, _GAPS = 7, 4  # characters of rich's time left, 1:23:45, and of the spaces between five columns
_LEAST_LABEL, _LEAST_BAR, _WIDEST_BAR = 8, 4, 40


class Progress:
    """Shows the steps of a run from construction to `close`.

    total_steps: optimizer steps of the whole run; first_step: steps done before this start; label: the run's name.
    visible: False shows nothing.
    console: where the bar goes; default stderr. It is a bar if that is a terminal; else `update` logs a line.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        label: str = "",
        visible: bool = True,
        console: Console | None = None,
    ) -> None:
        console = console or Console(stderr=True)
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._lines = visible and not console.is_terminal
        self._bar: rich_progress.Progress | None = None
        if visible and console.is_terminal:
            self._console, self._label = console, label
            self._bar = _train_bar(console)
            self._task = self._bar.add_task(label, total=total_steps, completed=first_step, facts="")
            self._fit({})
            self._bar.start()

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done: moves the bar, prints nothing. Cheap enough for every step."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the figures of a log step: loss, tokens per second, MFU, time left."""
        if self._bar:
            self._fit(metrics)
            self._bar.update(self._task, completed=step)
        elif self._lines:
            _logger.info("step %d/%d  %s  eta %s", step, self._total, describe(metrics), self._eta(step))

    def close(self) -> None:
        """Leave the terminal as it was. Calling it twice is harmless."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _fit(self, metrics: Mapping[str, float]) -> None:
        """Lay the bar out for the terminal as wide as it is now: the count of steps and the time left are always whole;
        the label is cut, the figures give way from the last on, and the bar itself takes what is left."""
        if self._bar is None:
            return
        room = self._console.width - 2 * len(str(self._total)) - 1 - _TIME_LEFT - _GAPS - _LEAST_BAR
        facts = describe(metrics, room - min(len(self._label), _LEAST_LABEL))
        label = _cut(self._label, max(0, min(room - len(facts), self._console.width // 3)))
        free = room - len(facts) - len(label) + _LEAST_BAR
        bar = next(column for column in self._bar.columns if isinstance(column, rich_progress.BarColumn))
        bar.bar_width = max(1, min(_WIDEST_BAR, free))
        self._bar.update(self._task, description=label, facts=facts)

    def _eta(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self._started) / done * max(0, self._total - step))


def describe(metrics: Mapping[str, float], room: int | None = None) -> str:
    """`loss 1.234  12.3k tokens/s  MFU 41.2 %` of a log step, FLOP/s where no MFU is known; what is not there is left
    out, and from the last on what does not fit into `room` characters."""
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4g}")
    if "speed/tokens_per_s" in metrics:
        parts.append(f"{quantity(metrics['speed/tokens_per_s'])} tokens/s")
    if "speed/mfu_frac" in metrics:
        parts.append(f"MFU {100 * metrics['speed/mfu_frac']:.1f} %")
    elif "speed/flops_per_s" in metrics:
        parts.append(f"{quantity(metrics['speed/flops_per_s'])}FLOP/s")
    while room is not None and parts and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(0, room - 1)] + "…" * (room > 0)


def quantity(value: float) -> str:
    """A figure with three digits and a magnitude: 987, 12.3k, 4.56M, 7.89G, 1.2T."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float) -> str:
    """41s, 3m20s, 5h07m, 2d03h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


@contextmanager
def work_progress(description: str, total: int, *, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Progress of any long work: yields `advance(count)`. A bar on a terminal; else a line every 10 % and 10 s or more.

    Example:
        with work_progress("indexing shards", len(urls)) as advance:
            index_shards(urls, progress=advance)
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _work_bar(console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count=1: bar.advance(task, count)
        return
    shown, done = [time.monotonic(), 0], 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        late = time.monotonic() - shown[0] >= 10
        if done >= total or (late and (done - shown[1]) * 10 >= total):
            shown[:] = [time.monotonic(), done]
            _logger.info("%s: %d/%d", description, done, total)

    yield advance


def _train_bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[facts]}"),
        rich_progress.TimeRemainingColumn(compact=True),
        console=console,
    )


def _work_bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeRemainingColumn(compact=True),
        console=console,
    )
