"""Curves and stacked areas over the step, as SVG text for the report. All charts of a page share one axis of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trichord.tracking.charts import COLORS, finish, new_figure

LARGE_IN = (4.5, 2.5)
SMALL_IN = (3.9, 2.3)  # panels that stand side by side: fewer inches, so that labels stay as large
DASHES = ("solid", "dashed", "dotted")
BAD_COLOR = "#C2352B"
_MAX_POINTS = 240
_FAR_APART = 20.0  # largest over least from which on an axis is logarithmic
_LEAST_MARK = 0.006  # width of a mark, as a share of the axis: one step of very many must still be seen


@dataclass(frozen=True)
class Line:
    """One curve: label in the legend, steps (ascending) and values; nan leaves a gap and a mark on the axis.

    target: it says what another curve should be: thin, dashed and grey, without an entry in the legend.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str = COLORS[0]
    dash: str = "solid"
    target: bool = False


def line_styles(count: int) -> list[tuple[str, str]]:
    """(colour, dash) of `count` curves: all different, up to 24."""
    return [(COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]) for i in range(count)]


def line_chart(
    lines: Sequence[Line],
    *,
    key: str,
    span: tuple[float, float],
    unit: str = "",
    marks: Sequence[float] = (),
    log: bool = False,
    from_zero: bool = False,
    by_curve: bool = False,
    size_in: tuple[float, float] = LARGE_IN,
) -> str:
    """Curves over the step. A curve with many points is drawn as the mean of bins inside a band from least to largest.

    key: unique on the page; span: first and last step of the axis; unit: label of the vertical axis; marks: steps with
    a vertical line (where a run was resumed); log, from_zero: the vertical scale; by_curve: marks of steps without a
    finite value have their curve's colour, else they are red.
    """
    figure, axes = new_figure(unit, size_in)
    for line in lines:
        _draw(axes, line)
        if by_curve:
            _mark_non_finite(axes, [line], span, line.color)
    if not by_curve:
        _mark_non_finite(axes, lines, span, BAD_COLOR)
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    _set_height(axes, finite, log, from_zero)
    _set_steps(axes, span, marks)
    return finish(figure, axes, key, legend=False)


def stacked_chart(
    lines: Sequence[Line],
    *,
    key: str,
    span: tuple[float, float],
    unit: str = "",
    marks: Sequence[float] = (),
    limit: float | None = None,
    size_in: tuple[float, float] = LARGE_IN,
) -> str:
    """Areas on top of each other over the same steps: the parts of a whole. limit: what is higher is cut off, and has a
    triangle at the upper edge."""
    figure, axes = new_figure(unit, size_in)
    thinned = [thin(line.steps, line.values) for line in lines]
    steps, parts = thinned[0][0], [[value if math.isfinite(value) else 0.0 for value in t[1]] for t in thinned]
    colors = [line.color for line in lines]
    if len(steps) == 1:  # an area of one step would have no width
        steps, parts = [steps[0] - 0.4, steps[0] + 0.4], [part * 2 for part in parts]
    axes.stackplot(steps, *parts, colors=colors, alpha=0.8, linewidth=0)
    axes.set_ylim(bottom=0, top=limit)
    if limit is not None:
        _mark_cut(axes, lines, limit, 0.01 * (span[1] - span[0]))
    _set_steps(axes, span, marks)
    return finish(figure, axes, key, legend=False)


def thin(
    steps: Sequence[float], values: Sequence[float], limit: int = _MAX_POINTS
) -> tuple[list[float], list[float], list[float], list[float]]:
    """At most `limit` points of a curve: (mean step, mean, least, largest) of equal bins; nan where a bin has none."""
    if len(steps) <= limit:
        points = list(values)
        return list(steps), points, points, points
    columns: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for i in range(limit):
        at = slice(i * len(steps) // limit, (i + 1) * len(steps) // limit)
        finite = [value for value in values[at] if math.isfinite(value)] or [math.nan]
        row = (sum(steps[at]) / len(steps[at]), sum(finite) / len(finite), min(finite), max(finite))
        for column, value in zip(columns, row):
            column.append(value)
    return columns


def non_finite_stretches(
    steps: Sequence[float], values: Sequence[float], gap: float = 0.0
) -> list[tuple[float, float]]:
    """(first, last) step of each stretch of log steps without a finite value; those at most `gap` apart are one."""
    found: list[tuple[float, float]] = []
    before = False  # whether the log step before this one belongs to the last stretch
    for step, value in zip(steps, values):
        bad = not math.isfinite(value)
        if bad and found and (before or step - found[-1][1] <= gap):
            found[-1] = (found[-1][0], step)
        elif bad:
            found.append((step, step))
        before = bad
    return found


def tick_text(value: float, _place: int = 0) -> str:
    """A figure at an axis: 0.25, 1500, 12.5k, 750M; no offset that stands apart."""
    for least, size, unit in ((1e16, 1, ""), (1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{unit}"
    return f"{value:g}".replace("-", "\N{MINUS SIGN}", 1) if value < 0 else f"{value:g}"


def _draw(axes, line: Line) -> None:
    steps, means, lows, highs = thin(line.steps, line.values)
    if line.target:
        axes.plot(steps, means, color="#48515b", linewidth=0.9, linestyle=(0, (4, 3)))
        return
    axes.plot(steps, means, color=line.color, linewidth=1.4, linestyle=line.dash)
    if len(steps) < len(line.steps):
        axes.fill_between(steps, lows, highs, color=line.color, alpha=0.18, linewidth=0)
    known = [False, *map(math.isfinite, means), False]
    lone = [i for i in range(len(steps)) if known[i + 1] and not known[i] and not known[i + 2]]
    # A line through one point is nothing.
    axes.plot([steps[i] for i in lone], [means[i] for i in lone], "o", color=line.color, markersize=3.5)


def _mark_non_finite(axes, lines: Sequence[Line], span: tuple[float, float], color: str) -> None:
    """Ticks on the axis at the steps where one of the curves has no finite value, below a faint band."""
    least = _LEAST_MARK * ((span[1] - span[0]) or 1.0)
    bad = {step for line in lines for step, value in zip(line.steps, line.values) if not math.isfinite(value)}
    steps = sorted({step for line in lines for step in line.steps}) if bad else []
    values = [math.nan if step in bad else 0.0 for step in steps]
    for first, last in non_finite_stretches(steps, values, least):
        missing = max(0.0, least - (last - first)) / 2
        axes.axvspan(first - missing, last + missing, ymax=0.035, color=color, linewidth=0)
        axes.axvspan(first - missing, last + missing, ymin=0.035, color=color, alpha=0.09, linewidth=0)


def _mark_cut(axes, lines: Sequence[Line], limit: float, apart: float) -> None:
    """Triangles at the upper edge where the sum of the lines is above the limit, `apart` steps or more from another."""
    shown: list[float] = []
    for step, *heights in zip(lines[0].steps, *(line.values for line in lines)):
        if sum(heights) > limit and (not shown or step - shown[-1] >= apart):
            shown.append(step)
    upper = axes.get_xaxis_transform()
    look = {"color": "#48515b", "markeredgecolor": "#ffffff", "markeredgewidth": 0.6, "markersize": 5}
    axes.plot(shown, [0.96] * len(shown), "^", transform=upper, clip_on=False, **look)


def _set_height(axes, finite: Sequence[float], log: bool, from_zero: bool) -> None:
    if not finite:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", fontsize=9, color="#48515b")
        return
    least, largest = min(finite), max(finite)
    if log and least > 0 and largest / least > _FAR_APART:
        axes.set_yscale("log")
        return
    axes.yaxis.set_major_formatter(tick_text)
    if least == largest == 0:
        axes.set_ylim(0, 1)
    elif from_zero or least == 0:  # what starts at zero counts something: there is nothing below
        axes.set_ylim(bottom=0)


def _set_steps(axes, span: tuple[float, float], marks: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, last = span
    for mark in marks:
        if first <= mark <= last:
            axes.axvline(mark, color="#7a8591", linewidth=0.8, linestyle=(0, (2, 2)))
    room = 0.01 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(tick_text)
