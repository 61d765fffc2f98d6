"""What the report says about one run beside its curves, as plain values for the template."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import yaml

from trichord.tracking.pages import file_uri
from trichord.tracking.previews import read_previews
from trichord.tracking.progress import duration
from trichord.tracking.record import RunRecord
from trichord.tracking.report_figures import figure, moment

_MAX_EVENTS = 200
_PREVIEW_STEPS = 3
_SHARDS_SHOWN = 3  # at either end
_SILENT_S, _SILENT_LINES = 300.0, 5.0  # a run is silent after this long, or after as many of its log intervals
# Events that a reader looks for, by how they are marked.
_EVENT_LOOKS = {
    **dict.fromkeys(("fault", "checkpoint_failed"), "failed"),
    **dict.fromkeys(("skipped_step", "rewind", "slow"), "stopped"),
    **dict.fromkeys(("checkpoint", "mirror"), "finished"),
    **dict.fromkeys(("start", "end"), "running"),
}


def run_view(run: RunRecord, now: float) -> dict[str, Any]:
    """Everything the template says about one run. now: seconds since the epoch."""
    times = _times(run)
    return {
        "name": run.name,
        "folder": str(run.folder),
        **_state(run, now),
        "progress": _progress(run),
        "attempts": run.attempts,
        "started": moment(times[0]) if times else "",
        "took": duration(times[-1] - times[0]) if len(times) > 1 else "",
        "discarded": run.discarded_lines,
        "broken": run.broken,
        "metrics": _results(run.result),
        "seconds": _plain(run.result.get("seconds")),
        "captions": [line for line in run.result.get("captions") or [] if isinstance(line, dict)],
        **_draws(run),
        "bad": run.bad_by_reason(),
        "bad_total": len(run.quarantine),
        "bad_examples": [[line.get(k) or "" for k in ("shard", "key", "member")] for line in run.quarantine[-10:]],
        "previews": _previews(run),
        "events": [_event(event) for event in run.events[-_MAX_EVENTS:]],
        "events_total": len(run.events),
        "summary": _summary(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    }


def _times(run: RunRecord) -> list[float]:
    return [row["time"] for row in run.rows if isinstance(row.get("time"), (int, float))]


def _state(run: RunRecord, now: float) -> dict[str, str]:
    """How the run ended, how that is marked, and why; of one that did not end, since when it is silent."""
    status, sign = run.status, run.last_sign
    outcome, reason = (status.outcome, status.reason) if status else ("outcome not known", "")
    if status and outcome != "running":
        return {"outcome": outcome, "look": outcome, "reason": reason}
    if sign is None:
        return {"outcome": outcome, "look": outcome if status else "", "reason": reason}
    said = f"{moment(sign)} ({duration(max(0.0, now - sign))} before this page was written)"
    if status and now - sign > _patience(run):
        said = f"running, says its status, but no sign of life since {said}: it died, or is stuck"
        return {"outcome": "no sign of life", "look": "stopped", "reason": said}
    reason = f"{reason} · " if reason else ""
    return {"outcome": outcome, "look": outcome if status else "", "reason": f"{reason}last sign of life {said}"}


def _patience(run: RunRecord) -> float:
    """Seconds without a line after which a run is taken for silent: some of its own log intervals, minutes at least."""
    times = _times(run)
    between = [later - earlier for earlier, later in pairwise(times)]
    return max(_SILENT_S, _SILENT_LINES * median(between) if between else 0.0)


def _progress(run: RunRecord) -> str:
    """`step 20 of 100`; where no step was logged, that."""
    total = _plain(run.config.get("run")).get("max_steps")
    of = f" of {total}" if total else ""
    if run.rows:
        return f"step {run.rows[-1]['step']}{of}"
    done = f"step {run.status.step}{of}, " if run.status and run.status.step > 0 else ""
    return f"{done}no step{'' if done else of} was logged"


def _draws(run: RunRecord) -> dict[str, Any]:
    """What was drawn from: per source against its target, and the shards that were seen least and most."""
    target, seen, shards = run.target_mix(), run.counts("samples_per_source"), run.counts("samples_per_shard")
    drawn, total = run.drawn_mix(), sum(seen.values())
    if total:  # all draws, not those of the logged steps
        drawn = {name: count / total for name, count in seen.items()}
    names = dict.fromkeys((*target, *drawn))
    ranked = sorted(shards.items(), key=lambda shard: (shard[1], shard[0]))
    ends = ranked if len(ranked) <= 2 * _SHARDS_SHOWN else [*ranked[:_SHARDS_SHOWN], *ranked[-_SHARDS_SHOWN:]]
    return {
        "sources": [(name, seen.get(name), target.get(name), drawn.get(name)) for name in names],
        "counted": bool(total),
        "counted_from": run.data.get("since_step") or 0,
        "counted_to": run.data.get("step"),
        "shards": [(*_in_short(shard), count) for shard, count in reversed(ends)],
        "shards_total": len(shards),
        "shards_left_out": len(ranked) - len(ends),
        "shards_gap": _SHARDS_SHOWN,
        "filtered": list(run.counts("filtered").items()),
    }


def _in_short(shard: str) -> tuple[str, str]:
    """The last part of a path or URL, and the whole."""
    return shard.rstrip("/").rpartition("/")[2] or shard, shard


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
    engine, batches, encoders = (_plain(config.get(room)) for room in ("engine", "batches", "encoders"))
    trunk, git = _plain(_plain(config.get("fusion")).get("trunk")), _plain(run.environment.get("git"))
    towers = {kind: _plain(tower) for kind, tower in encoders.items() if tower}
    starts = [event for event in run.events if event.get("kind") == "start"]
    lines = [
        ("objectives", ", ".join(name for name, value in _plain(config.get("objectives")).items() if value)),
        ("towers", ", ".join(f"{k} {v.get('name') or v.get('kind', '')}" for k, v in towers.items())),
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
        "time": moment(event["time"]) if isinstance(event.get("time"), (int, float)) else "",
        "kind": str(event.get("kind", "")),
        "look": _EVENT_LOOKS.get(str(event.get("kind")), ""),
        "step": event.get("step"),
        "facts": ", ".join(f"{key} {_short(value)}" for key, value in facts.items()),
    }


def _plain(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = figure(value) if isinstance(value, (bool, float)) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
