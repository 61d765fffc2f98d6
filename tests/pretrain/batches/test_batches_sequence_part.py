"""Parts of a shared batch: together they are the whole, and what a rank is sent is what its stretch has places for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trichord.batches.collate import collate
from trichord.batches.interleave import StreamPart
from trichord.batches.rows import DecodedClip, RowFormat, build_row
from trichord.batches.windows import PlannedSample
from trichord.shards.lanes import SampleRef

FORM = RowFormat(row_tokens=48, image_size=2, pad_id=0, image_id=4, audio_id=5)
NOTHING = np.zeros(0, np.float32), np.zeros(0, bool)

pieces = st.lists(st.sampled_from(["image", "audio", "text", "unplaced"]), max_size=4)
documents = st.lists(st.lists(pieces, max_size=3), min_size=1, max_size=3)


def document(number, kinds):
    """A sample of text, images and clips in any order; `unplaced`: an image that only a tower sees."""
    parts, items = [StreamPart.text([1])], []
    for kind in kinds:
        if kind == "text":
            parts.append(StreamPart.text([20, 21], learned=True, caption=True))
        elif kind == "audio":
            parts.append(StreamPart.audio(2))
            items.append(DecodedClip(7, waveform=np.zeros(7, np.int16)))
        else:
            parts.append(StreamPart.image((1, 3) if kind == "image" else (0, 0)))
            items.append(np.zeros((3, 2, 2), np.uint8))
    return PlannedSample(SampleRef(0, 0, number), "key", "x.tar", tuple(parts), (), number, *NOTHING), items


def batch_of(rows):
    made = []
    for kinds_of_row in rows:
        both = [document(number, kinds) for number, kinds in enumerate(kinds_of_row)]
        made.append(build_row([sample for sample, _ in both], [items for _, items in both], FORM))
    return collate(made)


def taken(bounds, values, part):
    return list(values)[part.own(bounds)]


@settings(max_examples=60, deadline=None)
@given(rows=documents, size=st.sampled_from([2, 3, 4, 6]))
def test_parts_make_up_the_batch(rows, size):
    batch = batch_of(rows)
    parts = [batch.shared(place, size).own for place in range(size)]
    labels = batch.label_index.tolist()
    assert [at for p in parts for at in taken(p.tokens, range(48 * len(rows)), p)] == list(range(48 * len(rows)))
    assert [label for p in parts for label in taken(p.labels, labels, p)] == labels
    assert sum(p.useful_tokens for p in parts) == batch.useful_tokens
    weighed = batch.weighed(torch.tensor([0.5]))
    assert sum(weighed.shared(place, size).label_weight for place in range(size)) == 0.5 * len(labels)
    assert weighed.shared(0, size).unshared().label_weight == 0.5 * len(labels)
    for part in parts:
        first, last = part.tokens[part.place], part.tokens[part.place + 1]
        assert all(first <= label < last for label in taken(part.labels, labels, part))
        for items, index, segments, counts in (
            (part.images, batch.image_index, batch.image_segments, batch.image_counts),
            (part.audios, batch.audio_index, batch.audio_segments, batch.audio_counts),
        ):
            inside = [at for at in index.tolist() if first <= at < last]
            assert taken(items.places, index.tolist(), part) == inside
            own_segments = range(part.segments[part.place], part.segments[part.place + 1])
            contrasted = taken(items.contrasted, segments.tolist(), part)
            assert contrasted == [number for number in segments.tolist() if number in own_segments]
            assert part.count(items.rows) == sum(taken(items.items, counts, part))
            assert items.rows[-1] == items.places[-1] == len(index)


def test_a_batch_nobody_shares_is_its_own_part():
    batch = batch_of([[["image", "text"], ["audio"]]])
    assert batch.shared(0, 1) is batch
    own = batch.own
    assert (own.size, own.own(own.tokens), own.count(own.images.rows)) == (1, slice(0, 48), 3)
    assert batch.shared(1, 2).unshared().own == own


def test_a_stream_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="48 tokens does not divide over 5"):
        batch_of([[["text"]]]).shared(0, 5)


def test_clips_of_a_part_start_at_zero():
    batch = batch_of([[["audio"], ["audio", "audio"]]])
    waveforms, offsets, log_mels, _ = batch.clips(slice(1, 3))
    assert (len(waveforms), offsets, len(log_mels)) == (14, [0, 7, 14], 0)
    assert batch.clips(slice(3, 3))[1] == [0]
