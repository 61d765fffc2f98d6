"""The charts of the report: which metrics are shown together, and where the time of a step goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trichord.tracking.progress import duration
from trichord.tracking.record import RunRecord
from trichord.tracking.report_curves import (
    LARGE_IN,
    SMALL_IN,
    Line,
    line_chart,
    line_styles,
    stacked_chart,
)

_MAX_CURVES = 12  # of one run in a chart
_MAX_PANELS = 12  # of one figure, where several runs are compared
_OPEN_PANELS = 4  # more of them, one per run, are folded
_PEAK = 3.0  # a step that takes this many times what nine of ten take would flatten the others

# The parts of a step, in the order they happen; whatever of `speed/step_ms` they leave is "other".
_STEP_PARTS = (
    "data/wait_ms",
    "speed/features_ms",
    "speed/forward_ms",
    "speed/backward_ms",
    "speed/forward_backward_ms",
    "speed/update_ms",
    "speed/save_ms",
)


@dataclass(frozen=True)
class _Group:
    """One chart: which metrics it shows. A metric goes to the first group that takes it."""

    title: str
    pattern: str
    unit: str = ""
    log: bool = False
    from_zero: bool = False
    skip_zero: bool = False
    """It says nothing where all of it is zero, such as messages of a single process."""
    target: str | None = None
    """What stands in the place of the name's second part in metrics that say what a curve should be."""


_GROUPS = (
    _Group("Loss", r"train/loss"),
    _Group("Next-token loss per source", r"train/loss/next_token/source/.+"),
    _Group("Next-token loss by what samples hold", r"train/loss/next_token/modality/.+"),
    _Group("Loss per objective", r"train/loss/.+"),
    _Group("Evaluation: loss", r"eval/.+/loss/.+"),
    _Group("Evaluation", r"eval/(?!time_s).+"),
    _Group("Evaluation: time", r"eval/time_s", "s", from_zero=True),
    _Group("Throughput", r"speed/tokens_per_s", "tokens/s"),
    _Group("Samples per second", r"speed/samples_per_s", "samples/s"),
    _Group("FLOPs utilisation", r".*[mh]fu_frac", "share of peak"),
    _Group("Model FLOPs", r"speed/flops_per_s", "FLOP/s"),
    _Group("Sent by a rank per step", r"comm/wire_mib(/.+)?", "MiB", from_zero=True, skip_zero=True),
    _Group("Memory", r"memory/.+_gib", "GiB", from_zero=True),
    _Group("Gradient norm", r"train/grad_norm", log=True),
    _Group("Learning rate", r"train/lr(/.+)?"),
    _Group("Useful tokens", r"data/useful_tokens_frac", "share of all positions"),
    _Group(
        "Data mix", r"data/mix_frac/.+", "share of samples; dashed: target", from_zero=True, target="mix_target_frac"
    ),
    _Group("Imbalance over ranks", r"data/imbalance.*", "largest / mean"),
    _Group("Bad samples", r"data/bad_samples", "samples so far", from_zero=True),
    _Group("Filtered samples", r"data/filtered_samples", "samples so far", from_zero=True),
)


@dataclass(frozen=True)
class Chart:
    """One figure of the page. legend: (label, colour, dash) of its curves, where the page does not give it; panels:
    (title, SVG), more than one stand side by side."""

    title: str
    panels: list[tuple[str, str]]
    note: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    folded: bool = False


class ReportCharts:
    """Charts of one page. labels: what each run is called in them; it has its colour and dash in all of them."""

    def __init__(self, runs: Sequence[RunRecord], labels: Sequence[str]) -> None:
        self.runs = runs
        self._labels = labels
        self.styles = line_styles(len(runs))
        ends = [row["step"] for run in runs if run.rows for row in (run.rows[0], run.rows[-1])]
        self._span = (min(ends), max(ends)) if ends else (0, 1)
        self._drawn = 0

    def draw(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Chart]:
        """All charts in order: the known groups, the split of the step, then whatever else was logged.

        on_progress: called with (done, total) figures.
        """
        jobs, charts = self._jobs(), []
        on_progress(0, len(jobs))
        for done, job in enumerate(jobs, start=1):
            if (chart := job()) is not None:
                charts.append(chart)
            on_progress(done, len(jobs))
        return charts

    def _jobs(self) -> list[Callable[[], Chart | None]]:
        names = list(dict.fromkeys(name for run in self.runs for name in run.names))
        taken = {name for name in names if name.startswith("data/mix_target_frac/")}
        taken.update((*_STEP_PARTS, "speed/step_ms", "train/tokens_seen", "train/samples_seen"))
        groups = []
        for group in _GROUPS:
            found = [name for name in names if name not in taken and re.fullmatch(group.pattern, name)]
            taken.update(found)
            if found:
                groups.append((group, found))
        groups += [(_Group(name, re.escape(name)), [name]) for name in names if name not in taken]
        at = next((i for i, (group, _) in enumerate(groups, 1) if group.title == "Throughput"), len(groups))
        jobs: list[Callable[[], Chart | None]] = [lambda g=group, n=found: self._chart(g, n) for group, found in groups]
        return [*jobs[:at], self._step_splits, *jobs[at:]]

    def _chart(self, group: _Group, names: Sequence[str]) -> Chart | None:
        if group.skip_zero and not any(any(run.series(name)[1]) for run in self.runs for name in names):
            return None
        return self._of_one_run(group, names) if len(self.runs) == 1 else self._of_several_runs(group, names)

    def _of_one_run(self, group: _Group, names: Sequence[str]) -> Chart:
        """All metrics of the group in one chart, a curve each."""
        run, shown = self.runs[0], names[:_MAX_CURVES]
        shorts = _short_names(names)
        lines = [
            Line(short, *run.series(name), color, dash)
            for name, short, (color, dash) in zip(shown, shorts, line_styles(len(shown)))
        ]
        svg = self._curves(group, [*lines, *self._targets(group, shown)], marks=run.resumed_at)
        legend = [(line.label, line.color, line.dash) for line in lines] if len(lines) > 1 else []
        more = f"; not drawn, but in metrics.jsonl: {', '.join(names[_MAX_CURVES:])}" if names[_MAX_CURVES:] else ""
        return Chart(group.title, [("", svg)], ", ".join(shown) + more + _said_of_non_finite(lines), legend)

    def _of_several_runs(self, group: _Group, names: Sequence[str]) -> Chart:
        """A panel for each metric of the group, with a curve per run in it."""
        panels, shown = [], names[:_MAX_PANELS]
        for name, short in zip(shown, _short_names(names)):
            lines = [
                Line(label, *run.series(name), color, dash)
                for run, label, (color, dash) in zip(self.runs, self._labels, self.styles)
                if name in run.columns
            ]
            size = LARGE_IN if len(names) == 1 else SMALL_IN
            svg = self._curves(group, [*lines, *self._targets(group, [name])], size_in=size)
            panels.append((short if len(names) > 1 else "", svg))
        more = f"; not drawn, but in metrics.jsonl: {', '.join(names[_MAX_PANELS:])}" if names[_MAX_PANELS:] else ""
        labelled = zip(self.runs, self._labels)
        without = [label for run, label in labelled if not any(name in run.columns for name in names)]
        more += f"; not logged by {', '.join(without)}" if without else ""
        return Chart(group.title, panels, ", ".join(shown) + more)

    def _curves(self, group: _Group, lines: Sequence[Line], **facts: Any) -> str:
        drawn = {"key": self._key(), "span": self._span, "unit": group.unit, "by_curve": len(self.runs) > 1}
        return line_chart(lines, log=group.log, from_zero=group.from_zero, **drawn, **facts)

    def _targets(self, group: _Group, names: Sequence[str]) -> list[Line]:
        """What the curves of `names` should be; what several runs have in common is drawn once."""
        if group.target is None:
            return []
        found = {}
        for name in names:
            room, _, rest = name.split("/", 2)
            for run in self.runs:
                steps, values = run.series(f"{room}/{group.target}/{rest}")
                if steps:
                    found[tuple(steps), tuple(values)] = Line("", steps, values, target=True)
        return list(found.values())

    def _step_splits(self) -> Chart | None:
        """Where the time of a step goes, stacked, a panel per run; the mean over ranks and steps that were logged."""
        parts = [name for name in _STEP_PARTS if any(name in run.columns for run in self.runs)]
        colors = {name: style[0] for name, style in zip((*parts, "other"), line_styles(len(parts) + 1))}
        labelled = zip(self.runs, self._labels)
        splits = [(run, label, lines) for run, label in labelled if (lines := _step_split(run, colors))]
        if not splits:
            return None
        panels, higher = [], []
        several = len(self.runs) > 1
        for run, label, lines in splits:
            limit, above, highest = _limit([sum(values) for values in zip(*(line.values for line in lines))])
            facts = {"size_in": SMALL_IN if several else LARGE_IN, "marks": [] if several else run.resumed_at}
            svg = stacked_chart(lines, limit=limit, key=self._key(), span=self._span, unit="ms", **facts)
            panels.append((label if several else "", svg))
            higher += [(highest, above, len(lines[0].steps))] if limit is not None else []
        note = ", ".join(parts) + _said_of_higher(higher, len(splits))
        legend = [(_part(name), color, "area") for name, color in colors.items()]
        return Chart("Time of a step", panels, note, legend, folded=len(panels) > _OPEN_PANELS)

    def _key(self) -> str:
        self._drawn += 1
        return f"c{self._drawn}"


def _short_names(names: Sequence[str]) -> list[str]:
    """Metrics without the parts that all of them begin with; of a sum and its parts the sum's own name stays."""
    columns = list(zip(*(name.split("/") for name in names)))
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    shared = min(shared, min(name.count("/") for name in names))
    return ["/".join(name.split("/")[shared:]) for name in names]


def _said_of_non_finite(lines: Sequence[Line]) -> str:
    steps = {step for line in lines for step, value in zip(line.steps, line.values) if not math.isfinite(value)}
    of = len({step for line in lines for step in line.steps}) if steps else 0
    return f"; red: not finite, {len(steps)} of {of} log steps" if steps else ""


def _step_split(run: RunRecord, colors: dict[str, str]) -> list[Line]:
    """The parts of a step of one run, over the log steps that have them all."""
    parts = [name for name in _STEP_PARTS if name in run.columns]
    rows = [row for row in run.rows if all(name in row for name in parts)] if parts else []
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    lines = [Line(_part(name), steps, [row[name] for row in rows], colors[name]) for name in parts]
    if all("speed/step_ms" in row for row in rows):
        rest = [max(0.0, row["speed/step_ms"] - sum(row[name] for name in parts)) for row in rows]
        lines.append(Line("other", steps, rest, colors["other"]))
    return lines


def _part(name: str) -> str:
    return name.rpartition("/")[2].removesuffix("_ms")


def _limit(totals: Sequence[float]) -> tuple[float | None, int, float]:
    """Where the axis of a step's time ends if a few steps (a save, the first one) would flatten all others, how many
    are higher, and the highest. None: nothing is cut off."""
    finite = sorted(total for total in totals if math.isfinite(total))
    usual = finite[int(0.9 * (len(finite) - 1))] if finite else 0.0
    if not usual or finite[-1] <= _PEAK * usual:
        return None, 0, 0.0
    limit = 1.5 * usual
    return limit, sum(total > limit for total in finite), finite[-1]


def _said_of_higher(cut: Sequence[tuple[float, int, int]], runs: int) -> str:
    """cut: (highest, how many are higher, of how many steps) of each run that has some."""
    if not cut:
        return ""
    above, steps = sum(one[1] for one in cut), sum(one[2] for one in cut)
    where = f" in {len(cut)} of {runs} runs" if runs > 1 else ""
    return f"; {above} of {steps} steps{where} are higher than shown (triangles), up to {_time(max(cut)[0])}"


def _time(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds / 1000:.3g} s" if milliseconds < 60_000 else duration(milliseconds / 1000)
