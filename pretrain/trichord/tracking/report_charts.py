"""The charts of the report: which metrics are shown together, and where the time of a step goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trichord.tracking.charts import Line, line_chart, stacked_chart
from trichord.tracking.metrics import series
from trichord.tracking.record import RunRecord

_MAX_LEGEND = 8

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
    _Group("Sent by a rank per step", r"comm/wire_mib(/.+)?", "MiB", from_zero=True),
    _Group("Memory", r"memory/.+_gib", "GiB", from_zero=True),
    _Group("Gradient norm", r"train/grad_norm", log=True),
    _Group("Learning rate", r"train/lr(/.+)?"),
    _Group("Useful tokens", r"data/useful_tokens_frac", "share of all positions"),
    _Group(
        "Data mix", r"data/mix_frac/.+", "share of samples; dashed: target", from_zero=True, target="mix_target_frac"
    ),
    _Group("Imbalance over ranks", r"data/imbalance.*", "largest / mean"),
    _Group("Bad samples", r"data/bad_samples", "samples so far"),
)


def report_charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """All charts of the page in order: the known groups, the split of the step, then whatever else was logged."""
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    charts, taken = [], set()
    for group in _GROUPS:
        found = [name for name in names if name not in taken and re.fullmatch(group.pattern, name)]
        taken.update(found)
        if found:
            charts.append(_chart(group, runs, found))
        if group.title == "Throughput":
            charts += [chart for run in runs if (chart := _step_split(run, len(runs) > 1))]
    taken.update(name for name in names if name.startswith("data/mix_target_frac/"))
    taken.update((*_STEP_PARTS, "speed/step_ms", "train/tokens_seen", "train/samples_seen"))
    others = [name for name in names if name not in taken]
    return charts + [_chart(_Group(name, re.escape(name)), runs, [name]) for name in others]


def _chart(group: _Group, runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    lines = []
    for run in runs:
        for name in names:
            steps, values = series(run.rows, name)
            if steps:
                lines.append(Line(_label(run, name, len(runs), names), steps, values))
    shown = lines[:_MAX_LEGEND]
    if group.target is not None and len(runs) == 1:
        shown += _targets(runs[0], names[:_MAX_LEGEND], group.target)
    marks = runs[0].resumed_at if len(runs) == 1 else []
    svg = line_chart(
        shown,
        key=group.title,
        unit=group.unit,
        marks=marks,
        log=group.log,
        from_zero=group.from_zero,
    )
    left_out = max(0, len(lines) - _MAX_LEGEND)
    note = f"{left_out} more curves are in metrics.jsonl" if left_out else ", ".join(names)
    return {"title": group.title, "svg": svg, "note": note}


def _label(run: RunRecord, name: str, num_runs: int, names: Sequence[str]) -> str:
    shared = _shared_parts(names)
    if len(names) == 1 or name.count("/") < shared:  # the sum beside its parts
        shared = name.count("/")
    short = "/".join(name.split("/")[shared:])
    if num_runs == 1:
        return short
    return run.name if len(names) == 1 else f"{run.name}: {short}"


def _shared_parts(names: Sequence[str]) -> int:
    """How many parts all names begin with; of a sum and its parts the sum's own name is not shared."""
    columns = list(zip(*(name.split("/") for name in names)))
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return min(shared, min(name.count("/") for name in names))


def _targets(run: RunRecord, names: Sequence[str], part: str) -> list[Line]:
    """What the curves of `names` should be."""
    found = []
    for name in names:
        room, _, rest = name.split("/", 2)
        steps, values = series(run.rows, f"{room}/{part}/{rest}")
        if steps:
            found.append(Line("", steps, values, target=True))
    return found


def _step_split(run: RunRecord, name_it: bool) -> dict[str, Any] | None:
    """Where the time of a step goes, stacked; the mean over ranks and steps that the loop logged."""
    parts = [name for name in _STEP_PARTS if name in run.names]
    rows = [row for row in run.rows if all(name in row for name in parts)]
    if not parts or not rows:
        return None
    steps = [row["step"] for row in rows]
    lines = [Line(name.rpartition("/")[2].removesuffix("_ms"), steps, [row[name] for row in rows]) for name in parts]
    if all("speed/step_ms" in row for row in rows):
        rest = [max(0.0, row["speed/step_ms"] - sum(row[name] for name in parts)) for row in rows]
        lines.append(Line("other", steps, rest))
    title = f"Time of a step: {run.name}" if name_it else "Time of a step"
    svg = stacked_chart(lines, key=f"split-{run.folder}", unit="ms", marks=run.resumed_at)
    return {"title": title, "svg": svg, "note": ", ".join(parts)}
