"""Lines, stacked areas, histograms and bars as SVG text for a page: small, without ids that clash, without links."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's colours, told apart with any colour vision; a grey in the place of their black, for dark pages.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D5761", "#8C564B")
# Drawn in the page's own colours, where it names them: a page may be dark.
_PAGE_COLORS = {
    "#e3e6ea": "var(--grid, #e3e6ea)",
    "#9aa3ad": "var(--axis, #9aa3ad)",
    "#48515b": "var(--label, #48515b)",
    "#7a8591": "var(--axis, #7a8591)",
    "#4d5761": "var(--label, #4d5761)",
}
_MAX_POINTS = 240
_MIN_BARS = 6  # room for as many, so that two bars are no walls
_MAX_NAME = 22  # characters of a bar's name
_SIZE_IN = (5.2, 2.9)  # shown at 300 to 700 pixels: labels stay readable at both ends


@dataclass(frozen=True)
class Line:
    """One curve: label in the legend, steps (ascending) and values; nan leaves a gap.

    target: it says what another curve should be: dashed and grey, without an entry in the legend.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    target: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    key: str,
    unit: str = "",
    marks: Sequence[float] = (),
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Curves over the step. A curve with many points is drawn as the mean of bins inside a band from least to largest.

    key: unique on the page; unit: label of the vertical axis; marks: steps with a vertical line (where a run was
    resumed); log, from_zero: the vertical scale.
    """
    figure, axes = _figure(unit)
    for line, color in zip(lines, _cycle(len(lines))):
        steps, means, lows, highs = thin(line.steps, line.values)
        if line.target:
            axes.plot(steps, means, color="#48515b", linewidth=0.9, linestyle=(0, (4, 3)))
            continue
        single = {"marker": "o", "markersize": 3} if len(steps) < 3 else {}
        axes.plot(steps, means, color=color, linewidth=1.4, label=line.label, **single)
        if len(steps) < len(line.steps):
            axes.fill_between(steps, lows, highs, color=color, alpha=0.18, linewidth=0)
    _mark(axes, marks, [line.steps for line in lines])
    if log and all(value > 0 for line in lines for value in line.values if math.isfinite(value)):
        axes.set_yscale("log")
    elif from_zero:
        axes.set_ylim(bottom=0)
    return _finish(figure, axes, key, legend=len(lines) > 1)


def stacked_chart(lines: Sequence[Line], *, key: str, unit: str = "", marks: Sequence[float] = ()) -> str:
    """Areas on top of each other over the same steps: the parts of a whole."""
    figure, axes = _figure(unit)
    thinned = [thin(line.steps, line.values) for line in lines]
    parts = [[0.0 if math.isnan(value) else value for value in means] for _, means, _, _ in thinned]
    axes.stackplot(
        thinned[0][0], *parts, labels=[line.label for line in lines], colors=_cycle(len(lines)), alpha=0.8, linewidth=0
    )
    axes.set_ylim(bottom=0)
    _mark(axes, marks, [line.steps for line in lines])
    return _finish(figure, axes, key, legend=True)


def histogram(
    columns: Sequence[tuple[float, float, float]],
    *,
    key: str,
    unit: str = "",
    marks: Sequence[tuple[str, float]] = (),
    log: bool = False,
) -> str:
    """Counts as columns: (from, to, count) each; columns of no width are drawn as one bar.

    unit: label of the horizontal axis; marks: (label, value) of vertical lines, such as a median; log: its scale.
    """
    figure, axes = _figure("count")
    axes.set_xlabel(unit, fontsize=8, color="#48515b")
    if len(columns) == 1:
        start, _, count = columns[0]
        axes.bar([f"{start:g}"], [count], width=0.3, color=COLORS[0])
    else:
        widths = [end - start for start, end, _ in columns]
        axes.bar([c[0] for c in columns], [c[2] for c in columns], width=widths, align="edge", color=COLORS[0])
        for number, (label, value) in enumerate(marks):
            color = COLORS[1 + number % (len(COLORS) - 1)]
            axes.axvline(value, color=color, linewidth=1.1, linestyle=(0, (3, 2)), label=label)
        if log:
            axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, key, legend=bool(marks) and len(columns) > 1)


def bar_chart(rows: Sequence[tuple[str, float]], *, key: str, unit: str = "") -> str:
    """Named amounts, one bar each, the first on top."""
    figure, axes = _figure("")
    axes.set_xlabel(unit, fontsize=8, color="#48515b")
    names = [name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…" for name, _ in rows]
    axes.barh(range(len(rows)), [value for _, value in rows], color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(max(len(rows), _MIN_BARS) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return _finish(figure, axes, key, legend=False)


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


def _figure(unit: str):
    from matplotlib.figure import Figure  # half a second, and not part of the base install

    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa3ad")
    axes.tick_params(which="both", colors="#48515b", labelsize=8)
    axes.set_xlabel("step", fontsize=8, color="#48515b")
    axes.set_ylabel(unit, fontsize=8, color="#48515b")
    axes.margins(x=0.01)
    return figure, axes


def _finish(figure, axes, key: str, *, legend: bool) -> str:
    from matplotlib import rc_context

    if legend:
        columns = 2 if len(axes.get_legend_handles_labels()[0]) > 1 else 1
        figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=columns)
    buffer = io.StringIO()
    # Text stays text: it takes the page's font and can be searched. The salt fixes the ids, so pages can be compared.
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "trichord"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), key)


def _embed(svg: str, key: str) -> str:
    """An SVG file as an element of an HTML page: no prologue, no namespaces (HTML knows them), own ids, fluid width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'="[^"]*"', _rounded, svg)
    svg = re.sub("|".join(_PAGE_COLORS), lambda color: _PAGE_COLORS[color[0]], svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # Charts of one page use the same ids for different shapes.
    prefix = re.sub(r"[^A-Za-z0-9]", "-", key)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', f"{head}>{rest}")
    return re.sub(r'((?:xlink:)?href="|url\()#', rf"\1#{prefix}-", svg)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point; the text of labels is no attribute and stays as it is."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def _mark(axes, marks: Sequence[float], steps: Sequence[Sequence[float]]) -> None:
    ends = [value for one in steps for value in one]
    for mark in marks:
        if ends and min(ends) <= mark <= max(ends):
            axes.axvline(mark, color="#7a8591", linewidth=0.8, linestyle=(0, (2, 2)))


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
