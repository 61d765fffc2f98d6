"""The order, labels, positions and spans of a segment, against values written out by hand."""

import numpy as np
import pytest

from trichord.batches.interleave import fill_segment, plan_segment, segment_positions
from trichord.batches.packed_batch import IGNORE_INDEX, SPAN_AUDIO, SPAN_IMAGE, SPAN_TEXT

IDS = {"bos_id": 1, "eos_id": 2, "image_id": 4, "audio_id": 5}
X = IGNORE_INDEX


def test_full_segment():
    layout = plan_segment((2, 3), 2, 1, 2)
    assert (layout.image, layout.audio, layout.prompt, layout.text, layout.length) == (
        (1, 7),
        (7, 9),
        (9, 10),
        (10, 12),
        13,
    )
    segment = fill_segment(layout, [20], [21, 22], **IDS)
    assert segment.input_ids.tolist() == [1, 4, 4, 4, 4, 4, 4, 5, 5, 20, 21, 22, 2]
    assert segment.labels.tolist() == [X, X, X, X, X, X, X, X, X, 21, 22, 2, X]
    assert segment.span_kind.tolist() == [SPAN_TEXT] + [SPAN_IMAGE] * 6 + [SPAN_AUDIO] * 2 + [SPAN_TEXT] * 4
    assert segment.span_ends.tolist() == [1, 7, 7, 7, 7, 7, 7, 8, 9, 10, 11, 12, 13]
    assert segment.positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7, 8, 9],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_prompt_is_learned_only_when_asked():
    layout = plan_segment(None, None, 2, 1)
    labels = fill_segment(layout, [20, 21], [30], **IDS, label_prompt=True).labels
    assert labels.tolist() == [20, 21, 30, 2, X]


def test_sample_without_text_has_no_end_and_no_labels():
    layout = plan_segment((1, 2), None, 0, None)
    segment = fill_segment(layout, [], [], **IDS)
    assert segment.input_ids.tolist() == [1, 4, 4]
    assert (segment.labels == X).all()


def test_text_alone_has_equal_axes_that_count_up():
    positions = segment_positions(plan_segment(None, None, 0, 5))
    np.testing.assert_array_equal(positions, np.tile(np.arange(7, dtype=np.float32), (3, 1)))


def test_towers_only_image_takes_no_room():
    layout = plan_segment((0, 0), 0, 0, 3)
    assert (layout.image, layout.audio, layout.length) == ((1, 1), (1, 1), 5)
    np.testing.assert_array_equal(segment_positions(layout)[0], np.arange(5))


def test_labels_are_the_next_input_ids():
    layout = plan_segment((3, 2), 4, 3, 6)
    segment = fill_segment(layout, [7, 8, 9], range(10, 16), **IDS, label_prompt=True)
    at = np.flatnonzero(segment.labels != X)
    np.testing.assert_array_equal(segment.labels[at], segment.input_ids[at + 1])
    assert len(at) == 3 + 6 + 1


def test_ids_that_differ_from_the_plan_are_refused():
    with pytest.raises(ValueError, match="planned for 2 text tokens, got 3"):
        fill_segment(plan_segment(None, None, 0, 2), [], [1, 2, 3], **IDS)
