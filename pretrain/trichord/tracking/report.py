"""`trichord report`: one self-contained HTML page about one or more runs, from the files of their folders alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.tracking.differences import config_differences
from trichord.tracking.pages import page_templates
from trichord.tracking.record import RunRecord, read_record
from trichord.tracking.report_charts import ReportCharts
from trichord.tracking.report_figures import figure, headline, moment, percent
from trichord.tracking.report_names import distinct_folders, short_names, tell_apart
from trichord.tracking.report_view import run_view

OnProgress = Callable[[int, int], None]
_MAX_TITLE = 60  # characters: names that are longer together are a list
_MAX_TILE_COLUMNS = 9


@dataclass(frozen=True)
class RunsToShow:
    """Runs whose names tell them apart, and what to say of how they were chosen."""

    runs: list[RunRecord]
    notes: list[str]


def _silent(done: int, total: int) -> None:
    """Progress that nobody follows."""


def render_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about the runs in `folders` (their curves share charts) and return its path.

    Raises:
        ConfigError: as `read_runs` and `write_report`.
    """
    return write_report(read_runs(folders), out)


def read_runs(folders: Sequence[Path], on_progress: OnProgress = _silent) -> RunsToShow:
    """The records of runs, each folder once, with names that tell them apart. on_progress: (done, total) runs.

    Raises:
        ConfigError: no folder was given, or one is no run folder.
    """
    if not folders:
        raise ConfigError("a report needs at least one run folder, got none")
    distinct, notes = distinct_folders(folders)
    on_progress(0, len(distinct))
    runs = []
    for folder in distinct:
        runs.append(read_record(folder))
        on_progress(len(runs), len(distinct))
    return RunsToShow(tell_apart(runs), notes)


def write_report(shown: RunsToShow, out: Path, on_progress: OnProgress = _silent) -> Path:
    """The page about runs that were read. on_progress: (done, total) charts.

    The page needs no network: styles and charts are in it. What users wrote (names, events, config) is escaped.

    Raises:
        ConfigError: the page cannot be written.
    """
    _check_place(out)
    page = _template().render(_context(shown, on_progress))
    try:
        return write_atomically(Path(out), page)
    except OSError as error:
        raise ConfigError(_unwritable(out, error.strerror or str(error))) from error


def _check_place(out: Path) -> None:
    """Refuse a place where no page can be written, before charts are drawn."""
    out = Path(out).absolute()
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file in it, such as {out / 'report.html'}")
    existing = next(place for place in out.parents if place.exists())
    if not existing.is_dir():
        raise ConfigError(_unwritable(out, f"{existing} is no folder"))
    if not os.access(existing, os.W_OK):
        raise ConfigError(_unwritable(out, f"no permission for {existing}"))


def _unwritable(out: Path, why: str) -> str:
    return f"--out {out}: cannot be written: {why}; name another file with --out"


def _context(shown: RunsToShow, on_progress: OnProgress) -> dict[str, Any]:
    """All names of the template."""
    runs, now = shown.runs, time.time()
    several = len(runs) > 1
    shorts, whole = short_names([run.name for run in runs])
    drawing = ReportCharts(runs, shorts)
    names = ", ".join(run.name for run in runs)
    tiles = headline(runs[0]) if not several else []
    return {
        "title": names if not several or len(names) <= _MAX_TITLE else f"{len(runs)} runs",
        "notes": shown.notes,
        "runs": [run_view(run, now) for run in runs],
        "tiles": tiles,
        "tile_columns": _columns(len(tiles)),
        "legend": [(short, *style) for short, style in zip(shorts, drawing.styles)] if several else [],
        "whole_name": whole,
        "compared": _comparison(runs) if several else None,
        "differences": config_differences([run.config for run in runs]) if several else [],
        "charts": drawing.draw(on_progress),
        "written": moment(now),
    }


def _template():
    environment = page_templates(Path(__file__).parent)
    environment.filters["figure"] = figure
    environment.filters["percent"] = percent
    return environment.get_template("report.html.j2")


def _columns(tiles: int) -> int:
    """Of tiles on a wide screen: full rows, or nearly."""
    if tiles <= _MAX_TILE_COLUMNS:
        return max(tiles, 6)
    return min(range(_MAX_TILE_COLUMNS, 4, -1), key=lambda columns: -tiles % columns)


def _comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The headline figures of several runs as a table: one row per run."""
    tiles = [{tile.label: tile.text for tile in headline(run)} for run in runs]
    columns = list(dict.fromkeys(label for run_tiles in tiles for label in run_tiles))
    return {"columns": columns, "rows": [(run.name, [t.get(c, "") for c in columns]) for run, t in zip(runs, tiles)]}
