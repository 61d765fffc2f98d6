"""One source from front to back, each sample once: what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from trichord.batches.collate import collate
from trichord.batches.config import BatchesConfig
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import DecodedItems, build_row
from trichord.batches.tokenizer import TextTokenizer
from trichord.batches.windows import ItemLengths, PlannedSample, SamplePlanner
from trichord.samples.config import SamplesConfig
from trichord.samples.sample import AugmentKey, DecodedSample, decode_items
from trichord.shards.config import ShardsConfig, SourceConfig
from trichord.shards.lanes import SampleRef
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.reader import open_sources


@dataclass(frozen=True)
class SequentialBatch:
    """Some neighbouring samples: decoded, and as one `PackedBatch` whose segment i is decoded[i].

    bad: what is said about the samples among them that could not be used; they are in neither form.
    """

    decoded: list[DecodedSample]
    batch: PackedBatch
    bad: list[QuarantineRecord]


def iter_source(
    source: SourceConfig,
    shards: ShardsConfig,
    samples: SamplesConfig,
    batches: BatchesConfig,
    *,
    lengths: ItemLengths,
    tokenizer: TextTokenizer,
    batch_samples: int,
    max_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    augment_seed: int | None = None,
) -> Iterator[SequentialBatch]:
    """Batches of up to `batch_samples` samples in the source's order, without slack, and as a rule not augmented.

    T is the sum of the segments, so it differs from batch to batch. Batch b goes to rank b % world_size; every rank
    gets as many, the last ones with one empty row of slack where a rank has none left, because under ZeRO-3 all ranks
    must call the model equally often. A batch all of whose samples are bad is such a row too.

    Args:
        source: what to read; `epochs` and `weight` are not looked at. shards: gives the caps on members; the sources in
            it are not read. max_samples: stop after that many; None: all. augment_seed: change items as training does,
            by this seed; None: not at all.

    Raises:
        DataError: the source cannot be read.
    """
    table = open_sources(shards.model_copy(update={"sources": (source,)}))[0]
    planner = SamplePlanner([table], samples, batches, tokenizer, lengths, shards.max_member_bytes)
    total = table.num_samples if max_samples is None else min(max_samples, table.num_samples)
    numbers = iter(range(total))
    chunks = list(iter(lambda: list(islice(numbers, batch_samples)), []))
    chunks += [[]] * (-len(chunks) % world_size)
    for chunk in chunks[rank::world_size]:
        yield _read_batch(chunk, planner, augment_seed)


def _read_batch(numbers: list[int], planner: SamplePlanner, augment_seed: int | None) -> SequentialBatch:
    planned: list[PlannedSample] = []
    decoded: list[DecodedSample] = []
    bad: list[QuarantineRecord] = []
    name = planner.tables[0].name
    for number in numbers:
        ref = SampleRef(0, 0, number)
        key = None if augment_seed is None else AugmentKey(augment_seed, name, 0, number)
        try:
            sample, text, meta = planner.plan(ref)
            pixels, waveform = decode_items(sample.entry, planner.samples, planner.max_member_bytes, key)
        except BadSample as error:
            bad.append(planner.left_out(ref, error).record)
            continue
        planned.append(sample)
        decoded.append(DecodedSample(name, sample.entry.key, pixels, waveform, text, meta))
    items = [DecodedItems(sample.pixels, sample.waveform) for sample in decoded]
    length = sum(sample.layout.length for sample in planned) or planner.batches.row_tokens
    row = build_row(planned, items, planner.tokenizer, planner.batches, planner.samples.image.size, length)
    return SequentialBatch(decoded, collate([row]), bad)
