"""Rows to arrays to batch, against values written out by hand; and the trip through shared memory."""

import dataclasses

import numpy as np
import pytest
import torch

from trichord.batches.collate import collate
from trichord.batches.decoding import DecodedRow
from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import IGNORE_INDEX
from trichord.batches.parcels import pack_parcel, unpack_parcel
from trichord.batches.rows import DecodedClip, RowArrays, RowFormat, build_row
from trichord.batches.slots import RowSlots
from trichord.batches.windows import PlannedSample, group_of
from trichord.shards.lanes import SampleRef

X = IGNORE_INDEX
FORM = RowFormat(row_tokens=10, image_size=2, pad_id=0, image_id=4, audio_id=5, target_columns=2, num_targets=1)


def sample(number, grid=None, audio_tokens=None, text=None, target=None) -> PlannedSample:
    parts = [StreamPart.text([1])]
    parts += [StreamPart.image(grid)] if grid else []
    parts += [StreamPart.audio(audio_tokens)] if audio_tokens else []
    parts += [StreamPart.text(text, learned=True, caption=True), StreamPart.text([2], learned=True)] if text else []
    targets = np.array(target or [0, 0], dtype=np.float32)
    present = np.array([target is not None])
    return PlannedSample(
        SampleRef(0, 0, number), f"k{number}", "x.tar", tuple(parts), (), 100 + number, targets, present
    )


def picture(value):
    return np.full((3, 2, 2), value, np.uint8)


def clip(length):
    return DecodedClip(length, waveform=np.arange(length, dtype=np.int16))


def two_rows(bad_first=False) -> list[RowArrays]:
    first = [sample(0, grid=(1, 2), text=[20], target=[1, 0]), sample(1, audio_tokens=2, text=[21], target=[0, 1])]
    decoded = [None if bad_first else [picture(7)], [clip(5)]]
    second = [sample(2, grid=(1, 1)), sample(3, text=[22, 23])]
    return [build_row(first, decoded, FORM), build_row(second, [[picture(9)], []], FORM)]


def test_batch_of_two_rows():
    batch = collate(two_rows())
    batch.check()
    assert batch.input_ids.tolist() == [1, 4, 4, 20, 2, 1, 5, 5, 21, 2, 1, 4, 1, 22, 23, 2, 0, 0, 0, 0]
    assert batch.labels.tolist() == [X, X, 20, 2, X, X, X, 21, 2, X, X, X, 22, 23, 2, X, X, X, X, X]
    assert batch.label_index.tolist() == [2, 3, 7, 8, 12, 13, 14]
    assert batch.segment_ids.tolist() == [0] * 5 + [1] * 5 + [2] * 2 + [3] * 4 + [-1] * 4
    assert batch.cu_seqlens.tolist() == [0, 5, 10, 12, 16, 20]
    assert batch.span_ends.tolist() == [1, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert batch.position_ids[1].tolist() == [0, 1, 1, 3, 4, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 0, 0, 0]
    assert batch.position_ids[2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 0, 0, 0]
    assert batch.image_spans.tolist() == [[1, 3], [11, 12]]
    assert batch.image_segments.tolist() == [0, 2]
    assert batch.image_index.tolist() == [1, 2, 11]
    assert batch.pixels[:, 0, 0, 0].tolist() == [7, 9]
    assert batch.audio_spans.tolist() == [[6, 8]]
    assert batch.audio_segments.tolist() == [1]
    assert batch.audio_index.tolist() == [6, 7]
    assert batch.audio_offsets == (0, 5)
    assert batch.text_spans.tolist() == [[3, 4], [8, 9], [11, 11], [13, 15]]
    assert batch.text_lengths == (1, 1, 0, 2)
    assert (batch.image_counts, batch.audio_counts) == ((2, 1), (2,))
    assert batch.group_ids.tolist() == [100, 101, 102, 103]
    assert batch.targets.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert batch.target_present.tolist() == [[True], [True], [False], [False]]
    assert batch.sample_ids[:, 2].tolist() == [0, 1, 2, 3]
    assert (batch.num_segments, batch.num_labels, batch.max_seqlen, batch.useful_tokens) == (4, 7, 5, 16)


def test_bad_sample_becomes_slack_and_nothing_else_moves():
    good, bad = collate(two_rows()), collate(two_rows(bad_first=True))
    bad.check()
    assert bad.bad_segments.tolist() == [True, False, False, False]
    assert bad.segment_ids[:5].tolist() == [-1] * 5
    assert bad.input_ids[:5].tolist() == [0] * 5
    assert (bad.labels[:5] == X).all()
    assert bad.text_lengths[0] == 0
    assert bad.target_present.tolist() == [[False], [True], [False], [False]]
    assert bad.num_segments == good.num_segments
    assert bad.num_images == good.num_images - 1
    for name in ("input_ids", "labels", "segment_ids", "span_kind", "span_ends"):
        torch.testing.assert_close(getattr(bad, name)[5:], getattr(good, name)[5:])
    torch.testing.assert_close(bad.position_ids[:, 5:], good.position_ids[:, 5:])
    torch.testing.assert_close(bad.waveforms, good.waveforms)
    assert bad.image_spans.tolist() == [[11, 12]]
    assert bad.image_segments.tolist() == [2]


def test_empty_rows_are_slack_no_longer_than_a_row():
    empty = build_row([], [], FORM)
    batch = collate([empty, empty, empty])
    batch.check()
    assert batch.cu_seqlens.tolist() == [0, 10, 20, 30]
    assert (batch.num_segments, batch.num_images, batch.num_labels, batch.max_seqlen) == (0, 0, 0, 10)
    assert batch.useful_tokens == 0
    assert batch.pixels.shape == (0, 3, 2, 2)
    assert batch.audio_offsets == (0,)


def test_dtypes_are_those_promised():
    batch = collate(two_rows())
    expected = {
        **dict.fromkeys(("input_ids", "labels", "label_index", "image_index", "audio_index"), torch.int64),
        **dict.fromkeys(("image_segments", "audio_segments", "group_ids", "sample_ids"), torch.int64),
        **dict.fromkeys(("segment_ids", "cu_seqlens", "span_ends", "image_spans", "audio_spans"), torch.int32),
        **{"text_spans": torch.int32, "position_ids": torch.float32, "span_kind": torch.int8},
        **{"targets": torch.float32, "target_present": torch.bool, "log_mels": torch.float32},
        **{"pixels": torch.uint8, "waveforms": torch.int16, "bad_segments": torch.bool},
    }
    assert {name: getattr(batch, name).dtype for name in expected} == expected
    empty = collate([build_row([], [], FORM)])
    assert {name: getattr(empty, name).dtype for name in expected} == expected


@pytest.mark.parametrize("name", ["labels", "pixels", "audio_index", "group_ids", "label_index", "targets"])
def test_check_names_both_numbers_of_a_batch_that_disagrees(name):
    batch = collate(two_rows())
    broken = dataclasses.replace(batch, **{name: getattr(batch, name)[:-1]})
    length = len(getattr(batch, name))
    with pytest.raises(ValueError, match=rf"{name}.* is {length - 1}, .* is {length}|set is 6, num_labels is 7"):
        broken.check()


def test_log_mel_of_workers_takes_the_place_of_waveforms():
    form = dataclasses.replace(FORM, num_mels=3)
    frames = np.arange(6, dtype=np.float32).reshape(2, 3)
    heard = build_row([sample(1, audio_tokens=2, text=[21])], [[DecodedClip(5, log_mel=frames)]], form)
    batch = collate([heard, build_row([], [], form), heard])
    batch.check()
    assert batch.log_mels.tolist() == [*frames.tolist(), *frames.tolist()]
    assert (batch.mel_offsets, batch.audio_offsets) == ((0, 2, 4), (0, 5, 10))
    assert batch.waveforms.shape == (0,)


@pytest.mark.parametrize(("slot_bytes", "slot"), [(2**20, 1), (64, 1), (2**20, None)])
def test_parcel_carries_a_row_unchanged(slot_bytes, slot):
    """In a slot, in a block because the slot is too small, in a block because there is none."""
    slots = RowSlots(2, slot_bytes)
    for arrays in [*two_rows(), *two_rows(bad_first=True), build_row([], [], FORM)]:
        parcel = pack_parcel(DecodedRow(arrays, ("told",)), slots, slot)
        assert (parcel.memory == 1) if (slot_bytes, slot) == (2**20, 1) else (parcel.memory.nbytes == parcel.size)
        got = unpack_parcel(parcel, slots)
        assert got.bad == ("told",)
        for field in dataclasses.fields(RowArrays):
            expected, array = getattr(arrays, field.name), getattr(got.arrays, field.name)
            if isinstance(expected, tuple):
                expected, array = np.concatenate(expected), np.concatenate(array)
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


def test_groups():
    assert group_of("A  Cat\n", {}, "x", 1) == group_of("a cat", {}, "y", 2)
    assert group_of("a cat", {}, "x", 1) != group_of("a dog", {}, "x", 1)
    assert group_of("a cat", {"group": 7}, "x", 1) == group_of(None, {"group": "7"}, "y", 2)
    assert group_of(None, {}, "x", 1) == group_of(None, {"group": None}, "x", 1) != group_of(None, {}, "x", 2)
    assert all(0 <= group_of(str(n), {}, "x", n) < 2**63 for n in range(100))
