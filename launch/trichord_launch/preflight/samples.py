"""Are there enough samples for the length of the run, or how many epochs is it?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trichord.config.run import RunConfig
from trichord.shards.index import SampleEntry
from trichord.shards.shares import WeightTree
from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.shards import SourceFacts

_ENTRIES = 64  # of each opened shard
_CHARS_PER_TOKEN = 4.0  # of English, with a vocabulary of tens of thousands
_MARKS = 2  # begin and end of a sample
_PATCH = 16


def check_samples(config: RunConfig, sources: Sequence[SourceFacts]) -> list[Finding]:
    """Verdict on all sources together, one line on each. sources: those that could be listed."""
    if len(sources) < len(config.shards.sources):
        return [Finding("samples", "skip", "not all shards could be listed")]
    counts = {facts.config.name: facts.samples for facts in sources}
    unknown = [name for name, count in counts.items() if count is None]
    if unknown:
        said = f"{', '.join(unknown)}: neither sidecars nor a shard that could be walked over"
        return [Finding("samples", "skip", said, "trichord data index makes the sidecars")]
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        remedy = "look at them with `trichord data lint`, or take the source out"
        return [Finding("samples", "fail", f"{', '.join(empty)}: no sample in any shard", remedy, "data")]
    return [_verdict(config, sources)]


def _verdict(config: RunConfig, sources: Sequence[SourceFacts]) -> Finding:
    per_row, how = _samples_per_row(config, sources)
    rows, steps = config.batches.rows_per_step, config.run.max_steps
    about = "" if all(facts.is_counted for facts in sources) else "about "
    lasting = [(facts.samples or 0) * (facts.config.epochs or 0) for facts in sources]
    endless = [facts for facts in sources if facts.config.epochs is None]
    total = sum(facts.samples or 0 for facts in sources)
    if steps is None:
        say = f"{about}{sum(lasting):,} over all epochs, about {int(sum(lasting) / (rows * per_row)):,} steps ({how})"
        return Finding("samples", "pass", say)
    least, likely = steps * rows, steps * rows * per_row
    if not endless and sum(lasting) < least:
        detail = (
            f"{about}{sum(lasting):,} samples over their epochs, and {steps:,} steps of {rows} rows need at least "
            f"{least:,}: the run ends when they are used up, its rates do not reach the end of their schedule"
        )
        remedy = "leave run.max_steps out: steps are then counted from `epochs`; or add shards, or raise `epochs`"
        return Finding("samples", "warn", detail, remedy)
    if not endless and sum(lasting) < likely:
        detail = f"{about}{sum(lasting):,} samples over their epochs, and about {likely:,.0f} are drawn ({how})"
        remedy = "leave run.max_steps out: steps are then counted from `epochs`"
        return Finding("samples", "warn", detail, remedy)
    epochs = ", ".join(f"{name} {share:.2g}" for name, share in _epochs(config, sources, likely).items())
    return Finding("samples", "pass", f"{about}{total:,}; the run is about this many epochs: {epochs} ({how})")


def _epochs(config: RunConfig, sources: Sequence[SourceFacts], draws: float) -> dict[str, float]:
    """How often each source is read, by the weights of step 0."""
    tree = WeightTree(
        [tuple(facts.config.group.split("/")) if facts.config.group else () for facts in sources],
        [facts.config.weight for facts in sources],
        [facts.config.weight_schedule for facts in sources],
        config.shards.group_weights,
        [1.0] * len(sources),
    )
    shares = tree.shares(0, range(len(sources)))
    found = {f.config.name: draws * share / sum(shares) / (f.samples or 1) for f, share in zip(sources, shares)}
    limits = {facts.config.name: facts.config.epochs for facts in sources}
    return {name: min(epochs, limits[name] or epochs) for name, epochs in found.items()}


def _samples_per_row(config: RunConfig, sources: Sequence[SourceFacts]) -> tuple[float, str]:
    """(samples in a row, how this is known), from the lengths in the sidecars of the opened shards."""
    batches = config.batches
    if batches.packing == "count":
        return float(batches.max_samples_per_row), f"{batches.max_samples_per_row} in each row"
    lengths = [_tokens(config, entry) for facts in sources for entry in _entries(facts)]
    if not lengths:
        return 1.0, "at least 1 in each row; lengths are not known before sidecars are made"
    fits = batches.row_tokens / (sum(lengths) / len(lengths))
    per_row = min(max(1.0, fits), float(batches.max_samples_per_row))
    return per_row, f"ESTIMATE: {per_row:.1f} in a row, {sum(lengths) / len(lengths):.0f} tokens each"


def _entries(facts: SourceFacts) -> list[SampleEntry]:
    found = []
    for index in facts.opened:
        step = max(1, index.num_samples // _ENTRIES)
        found += [index.entry(number, facts.config.fields) for number in range(0, index.num_samples, step)]
    return [entry for entry in found if entry.problem is None]


def _tokens(config: RunConfig, entry: SampleEntry) -> float:
    """Tokens of one sample: text by its characters, images and audio by what the towers make of them."""
    tokens = _MARKS + (entry.text_chars or 0) / _CHARS_PER_TOKEN
    vision, audio = config.encoders.vision, config.encoders.audio
    if entry.image_size is not None and vision is not None:
        named = re.search(r"patch(\d+)", vision.name)
        patch = vision.options.get("patch_size") or (int(named[1]) if named else _PATCH)
        tokens += (config.samples.image.size // patch) ** 2 if isinstance(patch, int) else 0
    if entry.audio_frames is not None and entry.audio_rate and audio is not None:
        seconds = min(entry.audio_frames / entry.audio_rate, config.samples.audio.max_seconds)
        tokens += seconds * config.samples.audio.sample_rate / audio.mel.hop_length / audio.stride
    return tokens
