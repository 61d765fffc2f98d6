"""The headline figures of a run, and how figures are written on the page."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from trichord.tracking.progress import quantity
from trichord.tracking.record import RunRecord


@dataclass(frozen=True)
class Tile:
    """label: what it is; text: the figure; where: what of its label depends on the run, such as a step."""

    label: str
    text: str
    where: str = ""


def headline(run: RunRecord) -> list[Tile]:
    """The headline figures of a run; what was not logged is left out."""
    found = [
        ("tokens/s", run.typical("speed/tokens_per_s"), quantity),
        ("MFU", run.typical("speed/mfu_frac"), percent),
        ("samples/s", run.typical("speed/samples_per_s"), quantity),
        ("step", run.typical("speed/step_ms"), lambda value: f"{figure(value)} ms"),
        ("waiting for data", _share(run.typical("data/wait_ms"), run.typical("speed/step_ms")), percent),
        ("useful tokens", run.typical("data/useful_tokens_frac"), percent),
        ("peak memory", run.largest("memory/"), lambda value: f"{value:.3g} GiB"),
        ("tokens seen", run.last("train/tokens_seen"), quantity),
        ("samples seen", run.last("train/samples_seen"), quantity),
        ("sent per step", run.typical("comm/wire_mib") or None, lambda value: f"{value:.3g} MiB"),
        ("bad samples", run.last("data/bad_samples"), quantity),
    ]
    tiles = [*_loss(run), *(Tile(label, text(value)) for label, value, text in found if value is not None)]
    return [*tiles, Tile("non-finite losses", str(run.non_finite))] if run.non_finite else tiles


def _loss(run: RunRecord) -> list[Tile]:
    steps, values = run.series("train/loss")
    if not steps:
        return []
    step, value = run.last_finite("train/loss")
    if value is None:
        return [Tile("loss, last", "not finite")]
    return [Tile("loss, last", figure(float(value)), "" if math.isfinite(values[-1]) else f"finite, at step {step}")]


def figure(value: Any) -> str:
    """A value for a table: four digits for a float, yes and no for a bool, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return str(value)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
