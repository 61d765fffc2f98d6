"""`trichord data preview`: the first steps of a run, row by row, as the model will see them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.loader import ItemLengths, Loader
from trichord.batches.packed_batch import PackedBatch
from trichord.config.run import RunConfig
from trichord.encoders.log_mel import clip_log_mel
from trichord.inspection.media import audio_uri, image_uri, mel_uri, wave_path
from trichord.inspection.row_view import RowView, Run, SegmentView, view_rows
from trichord.inspection.stats_page import write_html
from trichord.restore import build_from_config, item_lengths, training_lengths
from trichord.shards.quarantine import QuarantineRecord
from trichord.shards.reader import SourceTable, open_sources

MAX_ROWS = 32
"""Rows on a page, unless others are asked for: a row can hold megabytes of pictures."""
MAX_LEFT_OUT = 200
_SMALL_PIXELS = 144


@dataclass(frozen=True)
class Shown:
    """What the page needs beside the rows. log_mel: of a clip; None without an audio tower. reasons: why samples are
    bad, by shard and key."""

    config: RunConfig
    tables: list[SourceTable]
    log_mel: Callable[[np.ndarray], np.ndarray] | None
    reasons: dict[tuple[str, str | None], str] = field(default_factory=dict)


def write_preview(
    config: RunConfig, out: Path, *, steps: int = 1, rank: int = 0, world_size: int = 1, max_rows: int = MAX_ROWS
) -> dict[str, int]:
    """Write the page about the rows that `rank` gets in the first `steps` steps; returns a few counts.

    Raises:
        ConfigError: the tokenizer, the model or the rank does not fit, or the file cannot be written.
        DataError: a source cannot be read.
    """
    batches = config.batches.model_copy(update={"num_workers": 0})
    lengths = _lengths(config, batches)
    loader = Loader(
        config.shards, config.samples, batches, seed=config.run.seed, lengths=lengths, rank=rank, world_size=world_size
    )
    audio = config.encoders.audio
    log_mel = clip_log_mel(audio, config.samples.audio.sample_rate) if audio is not None else None
    shown = Shown(config, open_sources(config.shards), log_mel)
    page = _Page(shown, max_rows)
    for number, step in enumerate(islice(loader, steps), start=1):
        page.note(step.stats.records, step.stats.filtered)
        for batch in step.micro_batches:
            page.add(number, batch, view_rows(batch, batches.row_tokens, loader.tokenizer))
    loader.close()
    write_html("preview.html.j2", page.context(steps, rank, world_size), out)
    return page.counts


def _lengths(config: RunConfig, batches: BatchesConfig) -> ItemLengths:
    """As in training, but for log-mel: the page plays waveforms. Predicted costs matter only where rows are dealt."""
    if batches.deal_ranks == 1:
        return item_lengths(config)
    import torch

    from trichord.batches.tokenizer import load_tokenizer

    with torch.device("meta"):
        model = build_from_config(config, load_tokenizer(batches.tokenizer), random_weights=False)
    return replace(training_lengths(config, model), log_mel=None, num_mels=0)


class _Page:
    """Gathers what the template shows."""

    def __init__(self, shown: Shown, max_rows: int) -> None:
        self._shown, self._max_rows = shown, max_rows
        self._rows: list[dict[str, Any]] = []
        self._records: list[QuarantineRecord] = []
        self._filtered: Counter[str] = Counter()
        self._step = self._in_step = 0
        self.counts = {"rows": 0, "samples": 0, "useful_tokens": 0, "tokens": 0, "bad": 0, "images": 0, "clips": 0}

    def add(self, step: int, batch: PackedBatch, rows: list[RowView]) -> None:
        counts = self.counts
        counts["rows"] += len(rows)
        counts["tokens"] += sum(row.length for row in rows)
        counts["useful_tokens"] += batch.useful_tokens
        counts["samples"] += batch.num_segments - int(batch.bad_segments.sum())
        counts["images"] += batch.num_images
        counts["clips"] += batch.num_audios
        for row in rows:
            self._in_step = self._in_step + 1 if step == self._step else 1
            self._step = step
            if len(self._rows) < self._max_rows:
                title = f"Step {step}, row {self._in_step}"
                self._rows.append(_row(self._shown, batch, row, title, f"row{len(self._rows)}"))

    def note(self, records: tuple[QuarantineRecord, ...], filtered: dict[str, int]) -> None:
        self._records += records
        self._shown.reasons.update({(record.shard, record.key): record.reason for record in records})
        self._filtered.update(filtered)
        self.counts["bad"] += len(records)

    def context(self, steps: int, rank: int, world_size: int) -> dict[str, Any]:
        counts = self.counts
        left_out = [
            {
                "where": _base(r.shard),
                "shard": r.shard,
                "key": r.key or "",
                "member": r.member or "",
                "reason": r.reason,
            }
            for r in self._records[:MAX_LEFT_OUT]
        ]
        return {
            "title": self._shown.config.run.name,
            "note": f"Step{'s 1 to' if steps > 1 else ''} {steps} of rank {rank} of {world_size}, "
            f"augmented as in training, seed {self._shown.config.run.seed}.",
            "tiles": [
                ("rows", str(counts["rows"])),
                ("samples", str(counts["samples"])),
                ("useful tokens", f"{counts['useful_tokens'] / max(1, counts['tokens']):.1%}"),
                ("images", str(counts["images"])),
                ("clips", str(counts["clips"])),
                ("left out as bad", str(counts["bad"])),
                ("filtered", str(self._filtered.total())),
            ],
            "rows": self._rows,
            "hidden_rows": counts["rows"] - len(self._rows),
            "left_out": left_out,
            "left_out_more": max(0, len(self._records) - MAX_LEFT_OUT),
            "filtered": sorted(self._filtered.items(), key=lambda item: -item[1]),
            "written": time.strftime("%Y-%m-%d %H:%M"),
        }


def _row(shown: Shown, batch: PackedBatch, row: RowView, title: str, anchor: str) -> dict[str, Any]:
    slack = row.length - row.useful
    return {
        "id": anchor,
        "title": title,
        "note": f"{len(row.segments)} samples, {row.useful} of {row.length} tokens used, {slack} slack",
        "segments": [_segment(shown, batch, segment, row, f"{anchor}-{i}") for i, segment in enumerate(row.segments)],
        "empty": not row.segments,
    }


def _segment(shown: Shown, batch: PackedBatch, segment: SegmentView, row: RowView, anchor: str) -> dict[str, Any]:
    source, epoch, sample = segment.sample
    table = shown.tables[source]
    entry = table.entry(sample)
    texts = [_run(run, batch) for run in segment.runs]
    return {
        "id": anchor,
        "left": 100 * segment.start / row.length,
        "width": 100 * (segment.end - segment.start) / row.length,
        "bars": [
            {
                "kind": run.kind,
                "left": 100 * run.start / row.length,
                "width": 100 * (run.end - run.start) / row.length,
                "title": f"{run.kind}, tokens {run.start} to {run.end - 1}",
            }
            for run in segment.runs
        ],
        "color": segment.number % 6,
        "bad": segment.bad,
        "reason": shown.reasons.get((entry.shard, entry.key), "") if segment.bad else "",
        "key": entry.key,
        "shard": _base(entry.shard),
        "shard_url": entry.shard,
        "source": table.name,
        "facts": _facts(shown.config, segment, epoch, sample),
        "images": [_image(batch, number) for number in segment.images],
        "clips": [_clip(shown, batch, number) for number in segment.clips],
        "runs": texts,
    }


def _facts(config: RunConfig, segment: SegmentView, epoch: int, sample: int) -> list[tuple[str, str]]:
    facts = [
        ("tokens", f"{segment.end - segment.start} (from {segment.start})"),
        ("learned", str(segment.labels)),
        ("sample", f"{sample}, epoch {epoch}"),
        ("same item as", f"group {segment.group:016x}"),
    ]
    for axis, (low, high) in zip(("time", "height", "width"), segment.positions):
        facts.append((f"positions, {axis}", f"{low:g} to {high:g}"))
    if segment.targets is not None and not segment.bad:
        facts += _targets(config, *segment.targets)
    return facts


def _targets(config: RunConfig, values: np.ndarray, present: np.ndarray) -> list[tuple[str, str]]:
    """Name and value of each target that the sample has."""
    facts, column = [], 0
    for (name, target), there in zip(config.samples.targets.items(), present):
        width = target.size if target.kind == "classes" else 1
        own = values[column : column + width]
        column += width
        numbers = np.flatnonzero(own).tolist() if target.kind == "classes" else [int(own[0])]
        text = f"{own[0]:g}" if target.kind == "number" else ", ".join(_class(target.names, n) for n in numbers)
        facts.append((f"target {name}", text if there else "none"))
    return facts


def _class(names: tuple[str, ...], number: int) -> str:
    return names[number] if names else str(number)


def _image(batch: PackedBatch, number: int) -> dict[str, Any]:
    pixels = batch.pixels[number].numpy()
    tokens = batch.image_counts[number]
    size = f"{pixels.shape[2]} x {pixels.shape[1]}"
    small = pixels.shape[2] < _SMALL_PIXELS  # shown larger than it is: as squares, since that is what the model sees
    return {"uri": image_uri(pixels), "note": f"{size}, {_tokens(tokens)}", "small": small}


def _clip(shown: Shown, batch: PackedBatch, number: int) -> dict[str, Any]:
    start, end = batch.audio_offsets[number], batch.audio_offsets[number + 1]
    waveform = batch.waveforms[start:end].numpy()
    rate = shown.config.samples.audio.sample_rate
    mel = shown.log_mel(waveform) if shown.log_mel is not None else None
    return {
        "uri": audio_uri(waveform, rate),
        "path": wave_path(waveform),
        "mel": None if mel is None else mel_uri(np.asarray(mel)),
        "note": f"{len(waveform) / rate:.2f} s at {rate} Hz, {_tokens(batch.audio_counts[number])}"
        + ("" if mel is None else f", log-mel {len(mel)} frames of {mel.shape[1]}"),
    }


def _tokens(count: int) -> str:
    return f"{count} tokens" if count else "for its tower, not in the stream"


def _run(run: Run, batch: PackedBatch) -> dict[str, Any]:
    if run.kind in ("image", "audio"):
        return {"kind": run.kind, "tokens": [], "text": f"{run.kind}, {run.end - run.start} tokens", "learned": False}
    tokens = [{"text": t.text, "title": _token_title(t)} for t in run.tokens]
    return {"kind": run.kind, "tokens": tokens, "text": "", "learned": run.learned}


def _token_title(token) -> str:
    return f"id {token.id}{', to be predicted' if token.learned else ''}"


def _base(url: str) -> str:
    return url.rsplit("/", 1)[-1]
