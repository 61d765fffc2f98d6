"""One source from front to back, each sample once: what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trichord.batches.collate import collate
from trichord.batches.config import BatchesConfig
from trichord.batches.decoding import RowDecoder
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import DecodedClip, DecodedItems
from trichord.batches.tokenizer import TextTokenizer
from trichord.batches.windows import ItemLengths, PlannedSample, SamplePlanner
from trichord.samples.config import SamplesConfig
from trichord.samples.filters import FilteredSample
from trichord.samples.sample import DecodedSample, SampleContent
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
        source: what to read; `epochs`, `weight`, `group` and `follow` are not looked at. shards: gives the caps on
            members and the storage; its sources are not read. max_samples: stop after that many; None: all.
            augment_seed: change items as training does, by this seed; None: not at all.

    Raises:
        DataError: the source cannot be read.
    """
    table = open_sources(
        shards.model_copy(
            update={"sources": (source.model_copy(update={"group": "", "follow": False}),), "group_weights": {}}
        )
    )[0]
    planner = SamplePlanner([table], samples, batches, tokenizer, lengths, shards.max_member_bytes)
    decoder = RowDecoder(planner, augment_seed)
    total = table.num_samples if max_samples is None else min(max_samples, table.num_samples)
    numbers = iter(range(total))
    chunks = list(iter(lambda: list(islice(numbers, batch_samples)), []))
    chunks += [[]] * (-len(chunks) % world_size)
    for chunk in chunks[rank::world_size]:
        yield _read_batch(chunk, planner, decoder)


def _read_batch(numbers: list[int], planner: SamplePlanner, decoder: RowDecoder) -> SequentialBatch:
    planned: list[PlannedSample] = []
    items: list[DecodedItems] = []
    decoded: list[DecodedSample] = []
    bad: list[QuarantineRecord] = []
    for number in numbers:
        ref = SampleRef(0, 0, number)
        try:
            sample, content = planner.plan(ref)
            items.append(decoder.decode_items(sample))
        except FilteredSample:
            continue
        except BadSample as error:
            bad.append(planner.left_out(ref, error).record)
            continue
        planned.append(sample)
        decoded.append(_decoded_sample(planner.tables[0].name, sample, content, items[-1]))
    length = sum(sample.length for sample in planned) or planner.batches.row_tokens
    return SequentialBatch(decoded, collate([decoder.build(planned, items, length)]), bad)


def _decoded_sample(source: str, sample: PlannedSample, content: SampleContent, items: DecodedItems) -> DecodedSample:
    pixels = next((item for item in items if isinstance(item, np.ndarray)), None)
    clip = next((item for item in items if isinstance(item, DecodedClip)), None)
    waveform = None if clip is None else clip.waveform
    return DecodedSample(source, sample.key, pixels, waveform, content.text, content.meta)
