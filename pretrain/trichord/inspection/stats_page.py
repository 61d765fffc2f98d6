"""The page of `trichord data stats`: one HTML file with its plots inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.inspection.balance import Balance, balance_table
from trichord.inspection.distribution import FAR_APART, QUANTILES, Distribution
from trichord.inspection.stats import SourceStats, Stats
from trichord.tracking.charts import bar_chart, histogram
from trichord.tracking.pages import page_templates
from trichord.tracking.progress import duration, quantity

_UNITS = {
    "sample_bytes": ("Bytes per sample", "bytes"),
    "images_per_sample": ("Images per sample", "images"),
    "image_width": ("Image width", "pixels"),
    "image_height": ("Image height", "pixels"),
    "image_pixels": ("Image size", "pixels in all"),
    "image_aspect": ("Image aspect", "width / height"),
    "clips_per_sample": ("Clips per sample", "clips"),
    "audio_seconds": ("Clip length", "seconds"),
    "text_chars": ("Text length", "characters"),
    "text_tokens": ("Text length", "tokens"),
    "sample_tokens": ("Sample length", "tokens in the stream"),
}
_MAX_BARS = 12
_MAX_MEMBERS = 12


def write_page(stats: Stats, title: str, out: Path, balanced: tuple[str, list[Balance]] | None = None) -> Path:
    """Write the page, which needs no network. balanced: by what, and the weights.

    Raises:
        ConfigError: the file cannot be written.
    """
    columns, rows = _source_table(stats)
    context = {
        "title": title,
        "note": _note(stats),
        "tiles": _tiles(stats),
        "source_columns": columns,
        "source_rows": rows,
        "sections": [_section(source, number) for number, source in enumerate(stats.sources)],
        "quantile_names": ["count", "mean", "min", *(f"{q} %" for q in QUANTILES), "max"],
        "balance": None if balanced is None else _balance(*balanced),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    return write_html("stats.html.j2", context, out)


def write_html(template: str, context: dict[str, Any], out: Path) -> Path:
    """Render a template of this room; what users wrote is escaped. Raises ConfigError where `out` cannot be written."""
    environment = page_templates(Path(__file__).parent)
    try:
        return write_atomically(Path(out), environment.get_template(template).render(context))
    except OSError as error:
        raise ConfigError(f"{out}: the page cannot be written: {error.strerror}") from error


def _note(stats: Stats) -> str:
    tokens = {
        "all": "Tokens of all texts.",
        "sample": "Tokens of a sample of the texts.",
        "none": "Tokens not counted.",
    }
    duplicates = "" if stats.hashed else " Duplicates not looked for."
    return f"{tokens[stats.tokens_of]}{duplicates} Samples that filters leave out are in no figure."


def _tiles(stats: Stats) -> list[tuple[str, str]]:
    total = stats.total
    spread = total.spread
    facts = [
        ("samples", quantity(total.samples)),
        ("shards", quantity(sum(len(source.shards) for source in stats.sources))),
        ("in all", size(sum(shard.bytes for source in stats.sources for shard in source.shards))),
        ("images", quantity(spread["image_pixels"].count)),
        ("clips", quantity(spread["audio_seconds"].count)),
        ("of audio", duration(spread["audio_seconds"].total)),
        ("texts", quantity(spread["text_chars"].count)),
        ("tokens per sample", short(spread["sample_tokens"].mean) if spread["sample_tokens"].count else "0"),
        ("duplicates", quantity(sum(source.duplicates for source in stats.sources))),
        ("bad by their index", quantity(total.bad)),
        ("filtered", quantity(total.filtered.total())),
    ]
    return [(label, text) for label, text in facts if text not in ("0", "0s", "nan") or label == "duplicates"]


def _source_table(stats: Stats) -> tuple[list[str], list[list[str]]]:
    rows = source_rows(stats)
    columns = list(rows[0])
    return columns, [[str(row[column]) for column in columns] for row in rows]


def source_rows(stats: Stats) -> list[dict[str, Any]]:
    """A table of the sources, for the page and the terminal."""
    return [
        {
            "source": source.name,
            "shards": len(source.shards),
            "samples": source.figures.samples,
            "size": size(sum(shard.bytes for shard in source.shards)),
            "images": source.figures.spread["image_pixels"].count,
            "clips": source.figures.spread["audio_seconds"].count,
            "audio": duration(source.figures.spread["audio_seconds"].total),
            "texts": source.figures.spread["text_chars"].count,
            "duplicates": source.duplicates if stats.hashed else "-",
            "bad": source.figures.bad,
            "filtered": source.figures.filtered.total(),
        }
        for source in stats.sources
    ]


def spread_rows(spread: dict[str, Distribution]) -> list[tuple[str, list[str]]]:
    """(name, cells): count, mean, min, quantiles, max of what there is."""
    return [
        (
            name,
            [
                str(one.count),
                *(short(value) for value in (one.mean, one.least, *(one.quantile(q) for q in QUANTILES), one.most)),
            ],
        )
        for name, one in spread.items()
        if one.count
    ]


def _section(source: SourceStats, number: int) -> dict[str, Any]:
    figures = source.figures
    charts = [_histogram(name, spread, f"{number}-{name}") for name, spread in figures.spread.items() if _worth(spread)]
    if len(figures.rates) > 1:
        rates = [(f"{rate} Hz", float(count)) for rate, count in figures.rates.most_common(_MAX_BARS)]
        charts.append(
            {"title": "Sample rates", "svg": bar_chart(rates, key=f"{number}-rates", unit="clips"), "note": ""}
        )
    for key, label in figures.labels.items():
        bars = [(name, float(count)) for name, count in label.classes.most_common(_MAX_BARS)]
        if bars:
            more = f"the {_MAX_BARS} most frequent of {len(label.classes)}; " if len(label.classes) > _MAX_BARS else ""
            svg = bar_chart(bars, key=f"{number}-label-{key}", unit="samples")
            charts.append({"title": f"Classes of {key}", "svg": svg, "note": f"{more}{label.missing} have none"})
    members = list(source.members.items())
    return {
        "title": source.name,
        "charts": charts,
        "members": [(ext, facts["count"], size(facts["bytes"])) for ext, facts in members[:_MAX_MEMBERS]],
        "spreads": spread_rows(figures.spread),
    }


def _worth(spread: Distribution) -> bool:
    """A single value everywhere is said by the table of quantiles."""
    return spread.count > 0 and spread.most > spread.least


def _histogram(name: str, spread: Distribution, key: str) -> dict[str, Any]:
    title, unit = _UNITS[name]
    columns = spread.columns()
    log = spread.least > 0 and spread.most / spread.least > FAR_APART
    marks = [(f"median {short(spread.quantile(50))}", float(spread.quantile(50)))]
    svg = histogram(columns, key=key, unit=unit, marks=marks, log=log)
    note = f"{spread.count} values, mean {short(spread.mean)}, {short(spread.least)} to {short(spread.most)}"
    return {"title": title, "svg": svg, "note": note}


def _balance(by: str, rows: Sequence[Balance]) -> dict[str, Any]:
    table = balance_table(list(rows))
    return {"by": by, "columns": list(table[0]), "rows": [[short(cell) for cell in row.values()] for row in table]}


def short(value: Any) -> str:
    """Four digits of a float, whole numbers whole."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes with three digits: 987 B, 1.23 KiB, 45.6 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
