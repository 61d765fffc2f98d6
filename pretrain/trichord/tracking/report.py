"""`trichord report`: one self-contained HTML page about one or more runs, from the files of their folders alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.tracking.differences import config_differences
from trichord.tracking.pages import file_uri, page_templates
from trichord.tracking.previews import read_previews
from trichord.tracking.progress import duration, quantity
from trichord.tracking.record import RunRecord, read_record
from trichord.tracking.report_charts import report_charts

_MAX_EVENTS = 200
_PREVIEW_STEPS = 3
# Events that a reader looks for, by how they are marked.
_EVENT_LOOKS = {
    **dict.fromkeys(("fault", "checkpoint_failed"), "failed"),
    **dict.fromkeys(("skipped_step", "rewind", "slow"), "stopped"),
    **dict.fromkeys(("checkpoint", "mirror"), "finished"),
    **dict.fromkeys(("start", "end"), "running"),
}


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
        "differences": config_differences([run.config for run in runs]) if len(runs) > 1 else [],
        "charts": report_charts(runs),
        "written": _moment(time.time()),
    }
    return write_atomically(Path(out), _template().render(context))


def _template():
    environment = page_templates(Path(__file__).parent)
    environment.filters["figure"] = figure
    environment.filters["percent"] = _percent
    return environment.get_template("report.html.j2")


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """The headline figures of a run: (label, text)."""
    found = [
        ("loss, last", run.last("train/loss"), figure),
        ("tokens/s", run.typical("speed/tokens_per_s"), quantity),
        ("MFU", run.typical("speed/mfu_frac"), _percent),
        ("samples/s", run.typical("speed/samples_per_s"), quantity),
        ("step", run.typical("speed/step_ms"), lambda value: f"{figure(value)} ms"),
        ("waiting for data", _share(run.typical("data/wait_ms"), run.typical("speed/step_ms")), _percent),
        ("useful tokens", run.typical("data/useful_tokens_frac"), _percent),
        ("peak memory", run.largest("memory/"), lambda value: f"{figure(value)} GiB"),
        ("tokens seen", run.last("train/tokens_seen"), quantity),
        ("samples seen", run.last("train/samples_seen"), quantity),
        ("sent per step", run.typical("comm/wire_mib") or None, lambda value: f"{figure(value)} MiB"),
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
        "previews": _previews(run),
        "events": [_event(event) for event in run.events[-_MAX_EVENTS:]],
        "events_total": len(run.events),
        "summary": _summary(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    }


def _previews(run: RunRecord) -> list[dict[str, Any]]:
    """The newest steps' samples, pictures and sounds as data of the page; what is not there any more is left out."""
    lines = read_previews(run.folder)
    steps = sorted({line["step"] for line in lines})[-_PREVIEW_STEPS:]
    return [
        {"step": step, "samples": [_sample(run, line) for line in lines if line["step"] == step]}
        for step in reversed(steps)
    ]


def _sample(run: RunRecord, line: dict[str, Any]) -> dict[str, Any]:
    def embedded(names: Any, kind: str) -> list[str]:
        return [uri for name in names or [] if (uri := file_uri(run.folder, str(name), kind))]

    texts = {key: line.get(key) or "" for key in ("source", "given", "wanted", "predicted")}
    images, clips = embedded(line.get("images"), "image/jpeg"), embedded(line.get("clips"), "audio/wav")
    return {**texts, "right": line.get("right_frac"), "images": images, "clips": clips}


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
        "look": _EVENT_LOOKS.get(str(event.get("kind")), ""),
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
