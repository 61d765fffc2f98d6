"""The whole road of one shard: index, order, plan, decode, rows, batch; by the loader's own interface."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import islice

from trichord.batches.config import BatchesConfig
from trichord.batches.loader import ItemLengths, Loader
from trichord.core.errors import DataError
from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig, TargetConfig, TextConfig
from trichord.shards.config import FiltersConfig, MetaFilter, ShardsConfig, SourceConfig, StorageConfig
from trichord.shards.reader import open_sources

MAX_MESSAGE_CHARS = 4000
MAX_LINE_CHARS = 30_000  # of a quarantine record: a name of 4,096 bytes may be in it twice, with escapes
_MAX_STEPS = 3000
_LENGTHS = ItemLengths(image=lambda width, height: (2, 3), audio=lambda samples: 1 + samples // 1600)
_FILTERS = FiltersConfig(
    meta=(MetaFilter(key="similarity", min=0.1, missing="keep"),), max_image_aspect=50, min_text_chars=0
)
_TARGETS = {
    "label": TargetConfig(key="label", num_classes=3),
    "score": TargetConfig(key="similarity", kind="number"),
    "tags": TargetConfig(key="a.b", kind="classes", names=("x", "y")),
}


@dataclass(frozen=True)
class Outcome:
    """How a shard ended. kind: `samples` (all good), `left out` (some, by quarantine or filter), `refused` (DataError),
    `fault` (anything else). detail: message, or what is wrong; the same for the same bytes."""

    kind: str
    good: int = 0
    bad: int = 0
    detail: str = ""


def drive(url: str, tokenizer: str, options: dict[str, bool], cache_dir: str) -> Outcome:
    """Read one epoch of a shard as training does. DataError is an outcome; every other exception goes through."""
    try:
        return _drive(url, tokenizer, options, cache_dir)
    except DataError as error:
        message = str(error)
        clear = 20 <= len(message) <= MAX_MESSAGE_CHARS and message.isprintable()
        return Outcome(
            "refused" if clear else "fault", detail=message if clear else f"unclear message: {message!r:.500}"
        )


def _drive(url: str, tokenizer: str, options: dict[str, bool], cache_dir: str) -> Outcome:
    filters = _FILTERS if options.get("filters") else FiltersConfig()
    shards = ShardsConfig(
        sources=(SourceConfig(name="fuzz", shards=(url,), epochs=1, filters=filters),),
        window_samples=64,
        storage=StorageConfig(cache_dir=cache_dir, cache_gib=0.02, attempts=1),
    )
    loader = Loader(
        shards,
        SamplesConfig(
            image=ImageConfig(size=16, resize="random_resized_crop", min_crop_frac=0.3),
            audio=AudioConfig(max_seconds=5.0, long_clips="crop" if options.get("crop") else "drop", speed_frac=0.1),
            text=TextConfig(normalize="nfkc" if options.get("nfkc") else "none", collapse_spaces=True),
            targets=_TARGETS,
        ),
        BatchesConfig(
            tokenizer=tokenizer,
            rows_per_step=1,
            row_tokens=512,
            long_samples="split" if options.get("split") else "drop",
        ),
        seed=1,
        lengths=_LENGTHS,
        augment=options.get("augment", True),
    )
    total = sum(table.num_samples for table in open_sources(shards))
    good: set[tuple[int, ...]] = set()
    bad = filtered = 0
    records = []
    for step in islice(loader, _MAX_STEPS):
        for batch in step.micro_batches:
            batch.check()
            good.update(tuple(ref) for ref in batch.sample_ids[~batch.bad_segments].tolist())
        bad += step.stats.bad_samples
        filtered += sum(step.stats.filtered.values())
        records += step.stats.records
        if step.state.exhausted:
            break
    else:
        return Outcome("fault", detail=f"not used up after {_MAX_STEPS} steps of a shard with {total} samples")
    records += loader.damage_records
    longest = max((json.dumps(asdict(record)) for record in records), key=len, default="")
    if len(longest) > MAX_LINE_CHARS:
        return Outcome("fault", detail=f"a quarantine line of {len(longest)} characters: {longest[:300]}")
    # A long sample is split into segments, and can be bad in one of them.
    if (
        len(good) + bad + filtered < total
        or len(good) > total
        or (len(good) + bad > total and not options.get("split"))
    ):
        said = f"{len(good)} came, {bad} are quarantined, {filtered} filtered"
        return Outcome("fault", detail=f"{total} samples, of which {said}")
    kind = "samples" if len(good) == total and not loader.damage_records else "left out"
    return Outcome(kind, len(good), total - len(good), "; ".join(sorted(record.reason for record in records))[:2000])
