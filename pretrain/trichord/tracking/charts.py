"""Histograms and bars as SVG text for a page, and what all its charts are made with: small, without ids that clash."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

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
_MIN_BARS = 6  # room for as many, so that two bars are no walls
_MAX_NAME = 22  # characters of a bar's name
_SIZE_IN = (5.2, 2.9)  # shown at 300 to 700 pixels: labels stay readable at both ends


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
    figure, axes = new_figure("count")
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
    return finish(figure, axes, key, legend=bool(marks) and len(columns) > 1)


def bar_chart(rows: Sequence[tuple[str, float]], *, key: str, unit: str = "") -> str:
    """Named amounts, one bar each, the first on top."""
    figure, axes = new_figure("")
    axes.set_xlabel(unit, fontsize=8, color="#48515b")
    names = [name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…" for name, _ in rows]
    axes.barh(range(len(rows)), [value for _, value in rows], color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(max(len(rows), _MIN_BARS) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return finish(figure, axes, key, legend=False)


def new_figure(unit: str, size_in: tuple[float, float] = _SIZE_IN):
    """A matplotlib figure and its axes in the look of our pages; unit: label of the vertical axis."""
    from matplotlib.figure import Figure  # half a second, and not part of the base install

    figure = Figure(figsize=size_in, layout="constrained")
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


def finish(figure, axes, key: str, *, legend: bool) -> str:
    """The figure as an SVG element; key: unique on the page; legend: inside the figure, of all that has a label."""
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
