"""Chats, long samples, filters, targets, packing by count and dealing, through the whole loader."""

import itertools
import json
from collections import Counter
from contextlib import closing

import numpy as np
from batches_corpus import LENGTHS, SAMPLES

from trichord.batches.loader import ItemLengths, Loader, LoaderState
from trichord.shards.config import FiltersConfig, MetaFilter
from trichord.shards.reader import open_sources


def epoch_of(corpus, shards=None, **changes):
    """All steps of one epoch, and the keys by (source, number)."""
    shards = shards or corpus.shards(epochs=1)
    loader = Loader(shards, SAMPLES, corpus.batches(**changes), seed=7, lengths=LENGTHS)
    with closing(loader):
        steps = []
        for step in loader:
            steps.append(step)
            if step.state.exhausted:
                break
    return steps, open_sources(shards)


def segments_of(steps, tables):
    """(key, batch, segment) of every good segment."""
    for batch in itertools.chain.from_iterable(step.micro_batches for step in steps):
        for segment, (source, _, number) in enumerate(batch.sample_ids.tolist()):
            if not batch.bad_segments[segment]:
                yield tables[source].entry(number).key, batch, segment


def test_chats_and_documents_are_segments_with_several_items(corpus):
    steps, tables = epoch_of(corpus)
    talks = [(key, b, s) for key, b, s in segments_of(steps, tables) if key.startswith("t")]
    assert len(talks) == 12
    for key, batch, segment in talks:
        assert int((batch.image_segments == segment).sum()) == 2
        assert int((batch.audio_segments == segment).sum()) == 1
        assert batch.text_lengths[segment] == 0, "a chat has no caption"
        images = batch.image_spans[batch.image_segments == segment]
        clips = batch.audio_spans[batch.audio_segments == segment]
        assert images[0, 1] < clips[0, 0] < images[1, 0], "items stand where the text names them"
        inside = batch.segment_ids == segment
        labelled = int((batch.labels[inside] >= 0).sum())
        learned_before_clip = int((batch.labels[images[0, 1] : clips[0, 0] - 1] >= 0).sum())
        assert (learned_before_clip > 0) == (int(key[1:]) % 2 == 1), "a document is learned, what a user says is not"
        assert labelled > 0


def test_long_samples_go_on_in_further_segments(corpus):
    steps, tables = epoch_of(corpus, long_samples="split")
    pieces = [(b, s) for key, b, s in segments_of(steps, tables) if key == "long_row"]
    assert len(pieces) == 2
    labels = [b.labels[b.segment_ids == s] for b, s in pieces]
    assert sum(int((label >= 0).sum()) for label in labels) == 71, "70 words and the end"
    assert all(b.text_lengths[s] == 0 for b, s in pieces), "half a caption is no caption"
    assert "long_row" not in {record.key for step in steps for record in step.stats.records}
    used = Counter(key for key, _, _ in segments_of(steps, tables) if key != "long_row")
    assert set(used.values()) == {1}


def test_filters_leave_out_count_and_are_no_bad_data(corpus):
    shards = corpus.shards(epochs=1)
    rules = FiltersConfig(meta=(MetaFilter(key="group", max=3),), max_audio_seconds=0.3)
    first = shards.sources[0].model_copy(update={"filters": rules})
    steps, tables = epoch_of(corpus, shards.model_copy(update={"sources": (first, shards.sources[1])}))
    filtered = sum((Counter(step.stats.filtered) for step in steps), Counter())
    many = [(key, b, s) for key, b, s in segments_of(steps, tables) if int(b.sample_ids[s, 0]) == 0]
    assert filtered["meta group"] + filtered["meta group (not there)"] > 50
    assert filtered["max_audio_seconds"] > 0
    assert all(batch.target_present[segment, 0] for _, batch, segment in many)
    assert {float(batch.targets[segment, 0]) for _, batch, segment in many} <= {0.0, 1.0, 2.0, 3.0}
    bad = sum(step.stats.bad_samples for step in steps)
    assert len(many) + bad + sum(filtered.values()) == corpus.num_many
    unfiltered, _ = epoch_of(corpus)
    assert bad < sum(step.stats.bad_samples for step in unfiltered)


def test_rows_by_count_hold_samples_of_like_length(corpus):
    def spread(steps):
        rows = [b for step in steps for b in step.micro_batches if b.num_segments > 1]
        return np.mean([np.ptp(np.unique(b.segment_ids[b.segment_ids >= 0], return_counts=True)[1]) for b in rows])

    shape = {"max_samples_per_row": 3, "rows_per_step": 1}
    wide = corpus.shards(epochs=1, window_samples=48)
    steps, tables = epoch_of(corpus, wide, packing="count", row_tokens=200, **shape)
    packed, _ = epoch_of(corpus, wide, row_tokens=64, **shape)
    counts = Counter(b.num_segments for step in steps for b in step.micro_batches)
    assert set(counts) <= {0, 1, 2, 3}
    assert counts[3] > 0.7 * sum(counts[n] for n in (1, 2, 3))
    assert spread(steps) < spread(packed)
    assert set(Counter(key for key, _, _ in segments_of(steps, tables)).values()) == {1}


def test_dealt_rows_are_the_same_rows_in_other_hands(corpus):
    lengths = ItemLengths(LENGTHS.image, LENGTHS.audio, cost=lambda tokens, images, samples: 10 * images + samples / 99)

    def run(deal_ranks, num_workers=0):
        loaders = [
            Loader(
                corpus.shards(),
                SAMPLES,
                corpus.batches(rows_per_step=8, deal_ranks=deal_ranks, num_workers=num_workers),
                seed=7,
                lengths=lengths,
                rank=rank,
                world_size=2,
            )
            for rank in range(2)
        ]
        steps = [list(itertools.islice(loader, 12)) for loader in loaders]
        for loader in loaders:
            loader.close()
        return steps

    plain, dealt, in_workers = run(1), run(2), run(2, num_workers=1)
    for number, (of_plain, of_dealt, of_workers) in enumerate(zip(zip(*plain), zip(*dealt), zip(*in_workers))):
        states = [LoaderState.merge([step.state for step in ranks]) for ranks in (of_plain, of_dealt, of_workers)]
        assert states[0].to_json() == states[1].to_json() == states[2].to_json(), f"step {number}"
        rows = [sorted(_rows(step) for step in ranks) for ranks in (of_plain, of_dealt)]
        assert sorted(rows[0][0] + rows[0][1]) == sorted(rows[1][0] + rows[1][1])
        assert [_rows(step) for step in of_workers] == [_rows(step) for step in of_dealt]
        assert of_dealt[0].stats.imbalance == of_dealt[1].stats.imbalance
        costs = [step.stats.cost for step in of_dealt]
        assert of_dealt[0].stats.imbalance[1] == max(costs) / np.mean(costs)
    before = np.mean([steps.stats.imbalance[0] for steps in dealt[0]])
    after = np.mean([steps.stats.imbalance[1] for steps in dealt[0]])
    assert after < 1.05 < before
    moved = [_rows(step) for step in dealt[0]] != [_rows(step) for step in plain[0]]
    assert moved


def _rows(step):
    return [batch.sample_ids.tolist() for batch in step.micro_batches]


def test_tally_of_what_is_left_out_follows_the_finder(corpus):
    """Under dealing another rank than the lane's own finds a sample bad; the job's account is the same."""
    states = {}
    for world_size, deal_ranks in ((1, 1), (2, 2), (4, 2)):
        loaders = [
            corpus.loader(rank, world_size, rows_per_step=8, deal_ranks=deal_ranks) for rank in range(world_size)
        ]
        last = [list(itertools.islice(loader, 25))[-1].state for loader in loaders]
        states[world_size] = LoaderState.merge(last)
    assert states[1].quarantined > 10
    assert len({state.quarantine_digest() for state in states.values()}) == 1
    resumed = [corpus.loader(rank, 3, states[2], rows_per_step=8) for rank in range(3)]
    assert LoaderState.merge([loader.state for loader in resumed]).to_json() == states[2].to_json()


def test_half_empty_rows_wait_for_the_next_window(corpus):
    """Every sample once all the same, and none is put off twice."""

    def useful(steps):
        return sum(s.stats.useful_tokens for s in steps), sum(s.stats.row_tokens for s in steps if s.stats.samples)

    steps, tables = epoch_of(
        corpus, corpus.shards(epochs=1, window_samples=16), rows_per_step=1, max_samples_per_row=20
    )
    assert any(cursor.carried for step in steps for cursor in step.state.lanes.values())
    used = Counter(key for key, _, _ in segments_of(steps, tables))
    assert set(used.values()) == {1}
    carried = Counter(
        tuple(ref)
        for before, step in itertools.pairwise(steps)
        if before.state.lanes[0].window.window != step.state.lanes[0].window.window
        for ref in step.state.lanes[0].carried
    )
    assert carried
    assert set(carried.values()) == {1}
    tokens, places = useful(steps)
    assert tokens / places > 0.9


def test_a_state_with_samples_that_wait_goes_on_the_same(corpus):
    def run(steps, state=None):
        loader = Loader(
            *(corpus.shards(window_samples=16), SAMPLES, corpus.batches(rows_per_step=2)),
            **{"seed": 7, "lengths": LENGTHS, "state": state},
        )
        return list(itertools.islice(loader, steps))

    whole = run(24)
    waiting = [n for n, step in enumerate(whole) if any(c.carried for c in step.state.lanes.values())]
    assert waiting
    for stop in waiting[:: max(1, len(waiting) // 4)]:
        state = LoaderState.from_json(json.loads(json.dumps(whole[stop].state.to_json())))
        resumed = run(24 - stop - 1, state)
        assert [_rows(step) for step in resumed] == [_rows(step) for step in whole[stop + 1 :]]
        if resumed:
            assert resumed[-1].state == whole[-1].state
