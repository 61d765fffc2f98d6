"""Weights against imbalance: how often to draw each class or source, and how much each of its samples is to count.

For a class of n samples out of N, with rarest-first schemes from mild to strong:

    square root        share of draws ~ sqrt(n)
    effective number   share of draws ~ n * (1 - beta) / (1 - beta^n)     Cui et al. 2019, https://arxiv.org/abs/1901.05555
    inverse frequency  share of draws equal for all

The loss weight of a sample is (share of draws) / n, scaled so that its mean over all samples is 1: the same emphasis
without drawing differently. Use one of both, not both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trichord.building.split import group_name
from trichord.config.yaml_text import dump_yaml
from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically

Scheme = Literal["sqrt", "effective", "inverse"]
Means = Literal["draws", "loss"]
SCHEMES: tuple[Scheme, ...] = ("sqrt", "effective", "inverse")
DEFAULT_BETA = 0.9999


@dataclass(frozen=True)
class Balance:
    """One class or source. natural: its share of all samples. shares, losses: by scheme; shares sum to 1 over classes,
    losses have mean 1 over samples. repeats: how often its samples are drawn per pass over the largest class."""

    name: str
    count: int
    natural: float
    shares: dict[str, float]
    losses: dict[str, float]
    repeats: dict[str, float]


def balance(counts: Mapping[str, int], beta: float = DEFAULT_BETA) -> list[Balance]:
    """Weights of all classes, most frequent first.

    Args:
        counts: samples of each class; those with none are left out. beta: of the effective number, in [0, 1).

    Raises:
        ConfigError: fewer than two classes have samples, or beta is out of range.
    """
    if not 0 <= beta < 1:
        raise ConfigError(f"beta must be at least 0 and less than 1, got {beta}; Cui et al. use 0.9 to 0.9999")
    counts = {name: count for name, count in counts.items() if count > 0}
    if len(counts) < 2:
        raise ConfigError(f"balancing needs at least two classes with samples, got {', '.join(counts) or 'none'}")
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shares = {scheme: _shares(counts, scheme, beta) for scheme in SCHEMES}
    total = sum(counts.values())
    rows = []
    for name in names:
        most = names[0]
        per_sample = {scheme: shares[scheme][name] / counts[name] for scheme in SCHEMES}
        repeats = {scheme: per_sample[scheme] * counts[most] / shares[scheme][most] for scheme in SCHEMES}
        losses = {scheme: per_sample[scheme] * total for scheme in SCHEMES}
        own = {scheme: shares[scheme][name] for scheme in SCHEMES}
        rows.append(Balance(name, counts[name], counts[name] / total, own, losses, repeats))
    return rows


def _shares(counts: Mapping[str, int], scheme: Scheme, beta: float) -> dict[str, float]:
    raw = {name: _draws(count, scheme, beta) for name, count in counts.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def _draws(count: int, scheme: Scheme, beta: float) -> float:
    if scheme == "inverse":
        return 1.0
    if scheme == "sqrt":
        return math.sqrt(count)
    # expm1, log1p: beta^n is close to 1 where it matters
    effective = -math.expm1(count * math.log(beta)) / (1 - beta) if beta > 0 else 1.0
    return count / effective


def counts_of(stats: Mapping[str, Any], by: str) -> dict[str, int]:
    """Samples per source (`by` is "source") or per class of a label, from the JSON of `trichord data stats`.

    Raises:
        ConfigError: the label was not counted, or is no class.
    """
    if by == "source":
        return {source["name"]: source["samples"] for source in stats["sources"]}
    label = stats["total"]["labels"].get(by)
    if label is None:
        known = ", ".join(stats["total"]["labels"]) or "none"
        raise ConfigError(f"cannot balance by {by!r}: expected `source` or a key that --label counts ({known})")
    if label["other"] or "numbers" in label:
        raise ConfigError(f"cannot balance by {by!r}: it has too many values, or values that are no classes")
    return dict(label["classes"])


def overlay(rows: list[Balance], by: str, scheme: Scheme, means: Means = "draws") -> str:
    """YAML to lay over a run config: a weight per source; classes are the sources that `trichord data split` makes.

    means: the shares of draws, or the weights in the loss; then each is drawn as often as there are samples of it.

    Raises:
        ConfigError: a class cannot be the name of a source, or two would have the same.
    """
    names = [row.name if by == "source" else group_name(row.name) for row in rows]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"not every class can name a source of its own: {', '.join(names[:20])}; rename classes")
    weights = {name: _keys(row, rows[0], scheme, means) for name, row in zip(names, rows)}
    text = dump_yaml({"shards": {"sources": weights}})
    sources = "" if by == "source" else " sources.yaml"
    hint = "" if by == "source" else f"# sources.yaml is what `trichord data split --by {by}` wrote\n"
    what = "Shares of draws" if means == "draws" else "Weights in the loss"
    return f"# {what} by {by}, scheme {scheme}: trichord train CONFIG{sources} THIS_FILE\n{hint}{text}"


def _keys(row: Balance, largest: Balance, scheme: Scheme, means: Means) -> dict[str, float]:
    """Of one source. Shares of draws are relative: the largest has 1, the rest are easier to read beside it."""
    keys = {"weight": row.shares[scheme] / largest.shares[scheme]}
    if means == "loss":
        keys = {"weight": row.count / largest.count, "loss_weight": row.losses[scheme]}
    return {name: float(f"{value:.6g}") for name, value in keys.items()}


def write_overlay(rows: list[Balance], by: str, scheme: Scheme, means: Means, file: Path) -> None:
    """Write `overlay`. Raises ConfigError where it cannot be written."""
    text = overlay(rows, by, scheme, means)
    try:
        write_atomically(file, text)
    except OSError as error:
        raise ConfigError(f"--balance {file}: cannot be written: {error.strerror}") from error


def balance_table(rows: list[Balance]) -> list[dict[str, Any]]:
    """Rows for printing: counts, shares in percent, loss weights, repeats."""
    return [
        {
            "class": row.name,
            "samples": row.count,
            "now %": 100 * row.natural,
            **{f"{scheme} %": 100 * row.shares[scheme] for scheme in SCHEMES},
            **{f"repeats {scheme}": row.repeats[scheme] for scheme in SCHEMES},
            **{f"loss {scheme}": row.losses[scheme] for scheme in SCHEMES},
        }
        for row in rows
    ]


def balance_json(rows: list[Balance], by: str, beta: float) -> dict[str, Any]:
    """What goes into the JSON of the stats under `balance`."""
    classes = [
        {"class": row.name, "samples": row.count, "share": row.shares, "loss": row.losses, "repeats": row.repeats}
        for row in rows
    ]
    return {"by": by, "beta": beta, "classes": classes}
