"""Evaluation's reader: each sample of a source once, in order, unchanged, and as many batches on every rank."""

import pytest
from batches_corpus import LENGTHS, SAMPLES

from trichord.batches.sequential import iter_source
from trichord.batches.tokenizer import load_tokenizer
from trichord.shards.reader import open_sources


def read(corpus, source=0, **options):
    config = corpus.shards()
    return list(
        iter_source(
            config.sources[source],
            config,
            SAMPLES,
            corpus.batches(),
            lengths=LENGTHS,
            tokenizer=load_tokenizer(corpus.tokenizer),
            **({"batch_samples": 10} | options),
        )
    )


def test_each_sample_once_in_order_and_bad_ones_named(corpus):
    batches = read(corpus)
    table = open_sources(corpus.shards())[0]
    expected = [table.entry(number).key for number in range(table.num_samples)]
    bad = {record.key for batch in batches for record in batch.bad}
    assert bad == corpus.bad_keys | {"long_row"}
    assert [sample.key for batch in batches for sample in batch.decoded] == [k for k in expected if k not in bad]
    assert len(batches) == -(-table.num_samples // 10)


def test_batch_matches_its_samples_and_has_no_slack(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    for group in read(corpus):
        batch = group.batch
        batch.check()
        assert batch.num_segments == len(group.decoded)
        assert batch.useful_tokens == len(batch.input_ids)
        images = [sample.pixels for sample in group.decoded if sample.pixels is not None]
        talks = sum("messages" in sample.meta for sample in group.decoded)  # each has a second picture
        assert batch.num_images == len(images) + talks
        for segment, sample in enumerate(group.decoded):
            own = batch.pixels[batch.image_segments == segment].numpy()
            assert (len(own) == 0) if sample.pixels is None else (own[0] == sample.pixels).all()
        for sample, (start, end) in zip(group.decoded, batch.text_spans.tolist()):
            assert tokenizer.decode(batch.input_ids[start:end].tolist()) == (sample.text or "")


def test_reading_twice_gives_the_same_pixels_and_waveforms(corpus):
    for first, second in zip(read(corpus, source=1), read(corpus, source=1)):
        assert (first.batch.pixels == second.batch.pixels).all()
        assert (first.batch.waveforms == second.batch.waveforms).all()


def test_augmentation_follows_its_seed(corpus):
    plain, one, again, two = (read(corpus, augment_seed=seed)[0].batch for seed in (None, 1, 1, 2))
    assert (one.pixels == again.pixels).all()
    assert (one.waveforms == again.waveforms).all()
    for other in (plain, two):
        assert (one.pixels != other.pixels).any()
        assert (one.waveforms != other.waveforms).any()
    assert (one.input_ids == plain.input_ids).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_source_and_get_as_many_batches(corpus, world_size):
    alone = [sample.key for group in read(corpus, max_samples=45) for sample in group.decoded]
    ranks = [read(corpus, max_samples=45, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(groups) for groups in ranks} == {-(-5 // world_size)}
    keys = [sample.key for turn in zip(*ranks) for group in turn for sample in group.decoded]
    assert keys == alone
    filler = ranks[-1][-1]
    assert filler.decoded == []
    assert (filler.batch.num_segments, len(filler.batch.input_ids)) == (0, 64)
