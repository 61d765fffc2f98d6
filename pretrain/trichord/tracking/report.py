"""`trichord report`: one self-contained HTML page about one or more runs, from the files of their folders alone."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.tracking.charts import Line, line_chart, stacked_chart
from trichord.tracking.metrics import series
from trichord.tracking.pages import page_templates
from trichord.tracking.progress import duration, quantity
from trichord.tracking.record import RunRecord, read_record

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


_GROUPS = (
    _Group("Loss", r"train/loss"),
    _Group("Next-token loss per source", r"train/loss/next_token/source/.+"),
    _Group("Next-token loss by what samples hold", r"train/loss/next_token/modality/.+"),
    _Group("Loss per objective", r"train/loss/.+"),
    _Group("Evaluation", r"eval/.+"),
    _Group("Throughput", r"speed/tokens_per_s", "tokens/s"),
    _Group("Samples per second", r"speed/samples_per_s", "samples/s"),
    _Group("FLOPs utilisation", r".*[mh]fu_frac", "share of peak"),
    _Group("Model FLOPs", r"speed/flops_per_s", "FLOP/s"),
    _Group("Sent by a rank per step", r"comm/wire_mib(/.+)?", "MiB", from_zero=True),
    _Group("Memory", r"memory/.+_gib", "GiB", from_zero=True),
    _Group("Gradient norm", r"train/grad_norm", log=True),
    _Group("Learning rate", r"train/lr(/.+)?"),
    _Group("Useful tokens", r"data/useful_tokens_frac", "share of all positions"),
    _Group("Data mix", r"data/mix_frac/.+", "share of samples", from_zero=True),
    _Group("Target mix", r"data/mix_target_frac/.+", "share of samples", from_zero=True),
    _Group("Imbalance over ranks", r"data/imbalance.*", "largest / mean"),
    _Group("Bad samples", r"data/bad_samples", "samples so far"),
)
_MAX_EVENTS = 200
_MAX_LEGEND = 8


def render_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about the runs in `folders` (the curves of several runs share their charts) and return its path.

    The page needs no network: styles and charts are in it. What users wrote (names, events, config) is escaped.

    Raises:
        ConfigError: no folder was given, or one is no run folder.
    """
    if not folders:
        raise ConfigError("a report needs at least one run folder, got none")
    runs = [read_record(Path(folder)) for folder in folders]
    context = {
        "title": ", ".join(run.name for run in runs),
        "runs": [_run_view(run) for run in runs],
        "tiles": _tiles(runs[0]) if len(runs) == 1 else [],
        "compared": _comparison(runs) if len(runs) > 1 else None,
        "charts": _charts(runs),
        "written": _moment(time.time()),
    }
    return write_atomically(Path(out), _template().render(context))


def _template():
    environment = page_templates(Path(__file__).parent)
    environment.filters["figure"] = figure
    environment.filters["percent"] = _percent
    return environment.get_template("report.html.j2")


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
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
    marks = runs[0].resumed_at if len(runs) == 1 else []
    svg = line_chart(
        lines[:_MAX_LEGEND],
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
    short = name.rpartition("/")[2] if len({other.rpartition("/")[0] for other in names}) == 1 else name
    if num_runs == 1:
        return short
    return run.name if len(names) == 1 else f"{run.name}: {short}"


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


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """The headline figures of a run: (label, text)."""
    found = [
        ("loss, last", run.last("train/loss"), figure),
        ("tokens/s", run.typical("speed/tokens_per_s"), quantity),
        ("samples/s", run.typical("speed/samples_per_s"), quantity),
        ("step", run.typical("speed/step_ms"), lambda value: f"{figure(value)} ms"),
        ("waiting for data", _share(run.typical("data/wait_ms"), run.typical("speed/step_ms")), _percent),
        ("useful tokens", run.typical("data/useful_tokens_frac"), _percent),
        ("peak memory", run.largest("memory/"), lambda value: f"{figure(value)} GiB"),
        ("tokens seen", run.last("train/tokens_seen"), quantity),
        ("samples seen", run.last("train/samples_seen"), quantity),
        ("bad samples", run.last("data/bad_samples"), quantity),
    ]
    tiles = [(label, text(value)) for label, value, text in found if value is not None]
    return [*tiles, ("non-finite losses", str(run.non_finite))] if run.non_finite else tiles


def _comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The headline figures of several runs as a table: one row per run."""
    tiles = [dict(_tiles(run)) for run in runs]
    columns = list(dict.fromkeys(label for run_tiles in tiles for label in run_tiles))
    return {"columns": columns, "rows": [(run.name, [t.get(c, "") for c in columns]) for run, t in zip(runs, tiles)]}


def _run_view(run: RunRecord) -> dict[str, Any]:
    """Everything the template says about one run, as plain values."""
    target, drawn = run.target_mix(), run.drawn_mix()
    times = [row["time"] for row in run.rows if "time" in row]
    status = run.status
    return {
        "name": run.name,
        "folder": str(run.folder),
        "outcome": status.outcome if status else "unknown",
        "reason": status.reason if status else "",
        "step": run.rows[-1]["step"] if run.rows else (status.step if status else 0),
        "total_steps": (run.config.get("run") or {}).get("max_steps"),
        "attempts": run.attempts,
        "started": _moment(times[0]) if times else "",
        "took": duration(times[-1] - times[0]) if len(times) > 1 else "",
        "discarded": run.discarded_lines,
        "metrics": _results(run.result),
        "seconds": _plain(run.result.get("seconds")),
        "captions": [line for line in run.result.get("captions") or [] if isinstance(line, dict)],
        "sources": [(name, target.get(name), drawn.get(name)) for name in dict.fromkeys((*target, *drawn))],
        "bad": run.bad_by_reason(),
        "bad_total": len(run.quarantine),
        "bad_examples": [[line.get(k) or "" for k in ("shard", "key", "member")] for line in run.quarantine[-10:]],
        "events": [_event(event) for event in run.events[-_MAX_EVENTS:]],
        "events_total": len(run.events),
        "summary": _summary(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    }


def _results(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `result.json`'s metrics: name, value, chance, baseline, whether held out, note."""
    metrics = result.get("metrics")
    if not isinstance(metrics, dict):
        return []
    keys = ("value", "chance", "baseline", "held_out", "note")
    rows = [(name, metric if isinstance(metric, dict) else {"value": metric}) for name, metric in metrics.items()]
    return [{"name": name, **{key: metric.get(key) for key in keys}} for name, metric in rows]


def _summary(run: RunRecord) -> list[tuple[str, str]]:
    """The choices that make the run, one line each: (key, value); full config below it on the page."""
    config = run.config
    engine, batches = config.get("engine") or {}, config.get("batches") or {}
    encoders, trunk = config.get("encoders") or {}, (config.get("fusion") or {}).get("trunk") or {}
    git = run.environment.get("git") or {}
    starts = [event for event in run.events if event.get("kind") == "start"]
    lines = [
        ("objectives", ", ".join(name for name, value in (config.get("objectives") or {}).items() if value)),
        ("towers", ", ".join(f"{k} {v.get('name') or v.get('kind', '')}" for k, v in encoders.items() if v)),
        ("trunk", " ".join(f"{key} {trunk[key]}" for key in ("family", "hidden_size", "num_layers") if key in trunk)),
        ("engine", " ".join(f"{key} {engine[key]}" for key in ("zero_stage", "precision", "lr") if key in engine)),
        ("rows", " ".join(f"{key} {batches[key]}" for key in ("rows_per_step", "row_tokens") if key in batches)),
        ("processes", ", ".join(str(event["world_size"]) for event in starts if "world_size" in event)),
        ("code", f"{str(git.get('sha'))[:12]}{' + changes' if git.get('dirty') else ''}" if git.get("sha") else ""),
        ("host", str(run.environment.get("host") or "")),
    ]
    return [(key, value) for key, value in lines if value]


def _event(event: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in event.items() if key not in ("time", "kind", "step", "attempt")}
    return {
        "time": _moment(event["time"]) if isinstance(event.get("time"), (int, float)) else "",
        "kind": str(event.get("kind", "")),
        "step": event.get("step"),
        "facts": ", ".join(f"{key} {_short(value)}" for key, value in facts.items()),
    }


def figure(value: Any) -> str:
    """A value for a table: four digits for a float, yes and no for a bool, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _plain(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = figure(value) if isinstance(value, (bool, float)) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
