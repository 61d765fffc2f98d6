"""What a sample of each source holds: from the figures of `trichord data stats`, else from sidecars, else from caps.

Torch-free. A source's samples differ in length, and padded towers run at the longest of a micro-batch, so lengths are
kept as spreads (a few quantiles) and typical batches draw from all over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.json_option import read_json_option
from trichord.encoders.config import EncodersConfig
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig, SourceConfig

CHARS_PER_TOKEN = 4.0  # English under tokenizers of 30,000 to 150,000 entries; only where nothing was tokenised
_CAP_TEXT_TOKENS = 64  # a caption or a transcript, where nothing at all is known
_ENDLESS_TEXT = 1e9
_SIDECAR_SAMPLES = 200  # read per source; sidecars of one shard that are there already, none is made
_MAKE_STATS = "make it with this config: trichord data stats CONFIG --json FILE"
_QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


class DataOfRun(Protocol):
    """What a workload follows from: these leaves of a `RunConfig`."""

    @property
    def shards(self) -> ShardsConfig: ...
    @property
    def samples(self) -> SamplesConfig: ...
    @property
    def encoders(self) -> EncodersConfig: ...


@dataclass(frozen=True)
class Spread:
    """A distribution by its points (share of samples, value), shares ascending from 0 to 1, and its mean."""

    points: tuple[tuple[float, float], ...]
    mean: float

    @classmethod
    def constant(cls, value: float) -> Spread:
        return cls(((0.0, value), (1.0, value)), value)

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        points = tuple((q / 100, ordered[round(q / 100 * last)]) for q in (0, *_QUANTILES, 100))
        return cls(points, sum(ordered) / len(ordered))

    @classmethod
    def of_figures(cls, figures: Mapping[str, Any]) -> Spread | None:
        """`count`, `mean`, `min`, `max`, `p1` ... of `trichord data stats`; None where nothing was counted."""
        if not figures.get("count"):
            return None
        inner = [(int(key[1:]) / 100, float(value)) for key, value in figures.items() if key[:1] == "p" and key[1:]]
        points = [(0.0, float(figures["min"])), *sorted(inner), (1.0, float(figures["max"]))]
        return cls(tuple(points), float(figures["mean"]))

    def at(self, share: float) -> float:
        """The value below which `share` of the samples lie, linear between the points."""
        for (low, a), (high, b) in zip(self.points, self.points[1:]):
            if share <= high:
                return a if high == low else a + (b - a) * (share - low) / (high - low)
        return self.points[-1][1]


@dataclass(frozen=True)
class SourceLoad:
    """A sample of one source. share: of the draws of the whole run. images, clips: mean numbers per sample.
    clip_seconds: of each clip, cropped to the cap; text_tokens: of a sample, without its two end marks."""

    name: str
    share: float
    images: float
    clips: float
    clip_seconds: Spread
    text_tokens: Spread


@dataclass(frozen=True)
class Workload:
    """Sources whose shares sum to 1, and where the figures come from, for people."""

    sources: tuple[SourceLoad, ...]
    origin: tuple[str, ...]


def find_workload(config: DataOfRun, stats: Path | None) -> Workload:
    """The best figures there are.

    Raises:
        ConfigError: `stats` is no file of `trichord data stats`, or lacks a source of the run.
    """
    if stats is not None:
        return _weighted(config, *_from_stats(config, stats))
    loads, notes = [], []
    for source in config.shards.sources:
        load, note = _from_sidecars(config, source) or _from_caps(config, source)
        loads.append(load)
        notes.append(f"{source.name}: {note}")
    return _weighted(config, loads, notes)


def _weighted(config: DataOfRun, loads: Sequence[SourceLoad], notes: Sequence[str]) -> Workload:
    """Shares of draws from the configured weights; weights by tokens are divided by the mean sample."""
    weights = {source.name: source.weight for source in config.shards.sources}
    draws = [weights[load.name] for load in loads]
    origin = list(notes)
    if config.shards.weights_by == "tokens":
        draws = [weight / max(1.0, load.text_tokens.mean) for weight, load in zip(draws, loads)]
        origin.append("weights by tokens: divided by the mean text of a sample")
    if config.shards.group_weights or any(source.group for source in config.shards.sources):
        origin.append("groups of sources: their weights are not looked at, only each source's own")
    if any(source.weight_schedule for source in config.shards.sources):
        origin.append("weight schedules: the weights at the start are taken")
    total = sum(draws)
    sources = tuple(
        SourceLoad(load.name, draw / total, load.images, load.clips, load.clip_seconds, load.text_tokens)
        for draw, load in zip(draws, loads)
    )
    return Workload(sources, tuple(origin))


def _from_stats(config: DataOfRun, file: Path) -> tuple[list[SourceLoad], list[str]]:
    stats = _read_stats(file)
    by_name = {source["name"]: source for source in stats["sources"]}
    missing = [source.name for source in config.shards.sources if source.name not in by_name]
    if missing:
        raise ConfigError(
            f"--stats {file}: it has no source {missing[0]!r}, only {', '.join(sorted(by_name))}; {_MAKE_STATS}"
        )
    loads = []
    for source in config.shards.sources:
        try:
            loads.append(_load_of_figures(config, source, by_name[source.name]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"--stats {file}: not what `trichord data stats` writes: figures of source {source.name!r} are missing "
                f"or no numbers; {_MAKE_STATS}"
            ) from error
    notes = [f"samples as counted in {file.name}"]
    if stats.get("tokens_of") not in ("all", "sample"):
        notes.append(f"{file.name} has no token counts: text at {CHARS_PER_TOKEN:g} characters a token")
    return loads, notes


def _read_stats(file: Path) -> dict[str, Any]:
    """The file of statistics, each source a mapping with its name, each of its figures too where they are read."""
    stats = read_json_option("--stats", file, _MAKE_STATS)
    sources = stats.get("sources") if isinstance(stats, dict) else None
    if not isinstance(sources, list) or not all(
        isinstance(s, dict) and isinstance(s.get("name"), str) for s in sources
    ):
        raise ConfigError(
            f"--stats {file}: not what `trichord data stats` writes: no list of sources, each with a name; "
            f"{_MAKE_STATS}"
        )
    return stats


def _load_of_figures(config: DataOfRun, source: SourceConfig, figures: Mapping[str, Any]) -> SourceLoad:
    def mean(name: str) -> float:
        return float(figures.get(name, {}).get("mean") or 0.0)

    tokens = Spread.of_figures(figures.get("text_tokens", {}))
    if tokens is None:
        chars = Spread.of_figures(figures.get("text_chars", {})) or Spread.constant(0.0)
        tokens = _scaled(chars, 1 / CHARS_PER_TOKEN)
    seconds = Spread.of_figures(figures.get("audio_seconds", {})) or Spread.constant(0.0)
    return _seen_by_model(
        config, SourceLoad(source.name, 1.0, mean("images_per_sample"), mean("clips_per_sample"), seconds, tokens)
    )


def _from_sidecars(config: DataOfRun, source: SourceConfig) -> tuple[SourceLoad, str] | None:
    """From the sidecars of the first local shard that has them; None where there is none."""
    from trichord.shards.index import load_index
    from trichord.shards.sidecars import sidecar_places
    from trichord.shards.sources import expand_shards

    if "://" in source.shards[0]:
        return None
    try:
        urls = expand_shards(source)
        found = next((url for url in urls if Path(sidecar_places(url)[0] + ".len").is_file()), None)
        if found is None:
            return None
        index = load_index(found, source.fields)
        entries = [index.entry(i, source.fields) for i in range(min(_SIDECAR_SAMPLES, index.num_samples))]
    except (TrichordError, OSError):
        return None
    entries = [entry for entry in entries if entry.problem is None]
    if not entries:
        return None
    seconds = [e.audio_frames / e.audio_rate for e in entries if e.audio_frames and e.audio_rate]
    chars = [float(e.text_chars or 0) for e in entries]
    load = SourceLoad(
        source.name,
        1.0,
        sum("image" in e.members for e in entries) / len(entries),
        sum("audio" in e.members for e in entries) / len(entries),
        Spread.of_values(seconds) if seconds else Spread.constant(0.0),
        _scaled(Spread.of_values(chars), 1 / CHARS_PER_TOKEN),
    )
    note = f"sidecars of {len(entries)} samples of {Path(found).name}, text at {CHARS_PER_TOKEN:g} characters a token"
    return _seen_by_model(config, load), note


def _from_caps(config: DataOfRun, source: SourceConfig) -> tuple[SourceLoad, str]:
    """Nothing is known but the config: one of each thing the source requires (or the model has), clips at their cap."""
    has = set(source.require) or {"image", "audio", "text"}
    load = SourceLoad(
        source.name,
        1.0,
        float("image" in has),
        float("audio" in has),
        Spread.constant(config.samples.audio.max_seconds),
        Spread.constant(float(_CAP_TEXT_TOKENS)),
    )
    if has == {"text"}:
        load = SourceLoad(load.name, 1.0, 0.0, 0.0, load.clip_seconds, Spread.constant(_ENDLESS_TEXT))
        return load, "caps, as no sidecars are here: texts that fill whole rows"
    items = [
        f"1 {what}" for what, there in (("image", load.images), ("clip of the longest allowed", load.clips)) if there
    ]
    note = f"caps, as no sidecars are here: {', '.join(items) or 'no item'} and {_CAP_TEXT_TOKENS} text tokens a sample"
    return _seen_by_model(config, load), note


def _seen_by_model(config: DataOfRun, load: SourceLoad) -> SourceLoad:
    """Without what the model has no tower for, and with clips cropped to their cap."""
    cap = config.samples.audio.max_seconds
    seconds = Spread(tuple((share, min(value, cap)) for share, value in load.clip_seconds.points),
                     min(load.clip_seconds.mean, cap))  # fmt: skip
    return SourceLoad(
        load.name,
        load.share,
        load.images if config.encoders.vision is not None else 0.0,
        load.clips if config.encoders.audio is not None and seconds.mean > 0 else 0.0,
        seconds,
        load.text_tokens,
    )


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(tuple((share, value * factor) for share, value in spread.points), spread.mean * factor)
