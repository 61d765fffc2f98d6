"""The order, labels, positions and spans of a segment, against values written out by hand."""

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.drafts import DraftPart, draft_parts
from trichord.batches.interleave import StreamArrays, StreamPart, caption_span, segment_length
from trichord.batches.packed_batch import IGNORE_INDEX, SPAN_AUDIO, SPAN_IMAGE, SPAN_TEXT
from trichord.samples.interleaved import Item, Turn
from trichord.samples.sample import SampleContent
from trichord.shards.members import MemberRef

BOS, EOS = StreamPart.text([1]), StreamPart.text([2], learned=True)
X = IGNORE_INDEX


def written(parts):
    """The arrays of one segment alone."""
    stream = StreamArrays(segment_length(parts), pad_id=0, image_id=4, audio_id=5)
    assert stream.write(0, parts, 0) == segment_length(parts)
    return stream


def caption(*ids):
    return StreamPart.text(ids, learned=True, caption=True)


def test_full_segment():
    parts = [BOS, StreamPart.image((2, 3)), StreamPart.audio(2), StreamPart.text([20]), caption(21, 22), EOS]
    segment = written(parts)
    assert segment.input_ids.tolist() == [1, 4, 4, 4, 4, 4, 4, 5, 5, 20, 21, 22, 2]
    assert segment.labels.tolist() == [X, X, X, X, X, X, X, X, X, 21, 22, 2, X]
    assert segment.span_kind.tolist() == [SPAN_TEXT] + [SPAN_IMAGE] * 6 + [SPAN_AUDIO] * 2 + [SPAN_TEXT] * 4
    assert segment.span_ends.tolist() == [1, 7, 7, 7, 7, 7, 7, 8, 9, 10, 11, 12, 13]
    assert segment.positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7, 8, 9],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert caption_span(parts) == (10, 12)


def test_two_images_with_text_between_them():
    parts = [BOS, StreamPart.image((1, 2)), StreamPart.text([30], learned=True), StreamPart.image((2, 1)), EOS]
    segment = written(parts)
    assert segment.input_ids.tolist() == [1, 4, 4, 30, 4, 4, 2]
    assert segment.labels.tolist() == [X, X, 30, X, X, 2, X]
    assert segment.span_ends.tolist() == [1, 3, 3, 4, 6, 6, 7]
    assert segment.positions.tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 3, 4, 4, 6]]
    assert caption_span(parts) == (1, 1)


def test_sample_without_text_has_no_labels():
    segment = written([BOS, StreamPart.image((1, 2))])
    assert segment.input_ids.tolist() == [1, 4, 4]
    assert (segment.labels == X).all()


def test_text_alone_has_equal_axes_that_count_up():
    positions = written([BOS, caption(*range(10, 15)), EOS]).positions
    np.testing.assert_array_equal(positions, np.tile(np.arange(7, dtype=np.float32), (3, 1)))


def test_towers_only_image_takes_no_room():
    parts = [BOS, StreamPart.image((0, 0)), StreamPart.audio(0), caption(7, 8, 9), EOS]
    assert segment_length(parts) == 5
    np.testing.assert_array_equal(written(parts).positions[0], np.arange(5))


def test_labels_are_the_next_input_ids():
    learned = StreamPart.text([7, 8, 9], learned=True)
    segment = written([BOS, StreamPart.image((3, 2)), StreamPart.audio(4), learned, caption(1, 3), EOS])
    at = np.flatnonzero(segment.labels != X)
    np.testing.assert_array_equal(segment.labels[at], segment.input_ids[at + 1])
    assert len(at) == 3 + 2 + 1


CONFIG = BatchesConfig(tokenizer="unused")
PICTURE = Item("image", MemberRef("0.jpg", "k.0.jpg", 0, 9), (8, 8))


def test_fields_become_items_prompt_caption_and_end():
    content = SampleContent((PICTURE,), "a heron", None, {"prompt": "describe"})
    assert draft_parts(content, CONFIG) == [
        DraftPart(item=PICTURE),
        DraftPart("describe"),
        DraftPart("a heron", learned=True, caption=True, ends=True),
    ]
    learning = CONFIG.model_copy(update={"label_prompt": True})
    assert draft_parts(content, learning)[1] == DraftPart("describe", learned=True)
    assert draft_parts(SampleContent((PICTURE,), None, None), CONFIG) == [DraftPart(item=PICTURE)]


def test_chat_learns_what_the_assistant_says_and_where_it_ends():
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", (PICTURE, "Who?")),
        Turn("assistant", ("A heron.",)),
        Turn("user", ("Sure?",)),
        Turn("assistant", ("Yes.",)),
    )
    assert draft_parts(SampleContent((PICTURE,), None, turns), CONFIG) == [
        DraftPart("Be brief."),
        DraftPart("\nUser: "),
        DraftPart(item=PICTURE),
        DraftPart("Who?"),
        DraftPart("\nAssistant: "),
        DraftPart("A heron.", learned=True),
        DraftPart(learned=True, ends=True),
        DraftPart("\nUser: "),
        DraftPart("Sure?"),
        DraftPart("\nAssistant: "),
        DraftPart("Yes.", learned=True),
        DraftPart(learned=True, ends=True),
    ]


def test_document_is_learned_whole():
    content = SampleContent((PICTURE,), None, (Turn("document", ("Herons", PICTURE, "wade.")),))
    assert draft_parts(content, CONFIG) == [
        DraftPart("Herons", learned=True),
        DraftPart(item=PICTURE),
        DraftPart("wade.", learned=True),
        DraftPart(learned=True, ends=True),
    ]


def test_segments_end_to_end_with_slack_behind():
    stream = StreamArrays(8, pad_id=0, image_id=4, audio_id=5)
    end = stream.write(0, [BOS, caption(7), EOS], 0)
    assert stream.write(end, [BOS, StreamPart.image((1, 1))], 1) == 5
    assert stream.input_ids.tolist() == [1, 7, 2, 1, 4, 0, 0, 0]
    assert stream.labels.tolist() == [7, 2, X, X, X, X, X, X]
    assert stream.segment_ids.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert stream.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert stream.span_ends.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
