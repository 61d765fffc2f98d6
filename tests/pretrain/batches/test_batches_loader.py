"""The loader's accounts: every sample once, every bad one named, states that cannot be mixed up."""

import itertools
import logging
import pickle
from collections import Counter
from contextlib import closing

import pytest
from batches_corpus import LENGTHS, SAMPLES, Canary

from trichord.batches.loader import ItemLengths, Loader, LoaderState, count_steps
from trichord.core.errors import CheckpointError, ConfigError, DataError
from trichord.shards.reader import open_sources

EPOCHS = 2


def run_epochs(corpus, **options):
    """All steps of all sources' epochs, until the lanes are used up, and one step more."""
    steps = []
    with closing(corpus.loader(epochs=EPOCHS, **options)) as loader:
        for step in loader:
            steps.append(step)
            if len(steps) > 1 and steps[-2].state.exhausted:
                return steps
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def epochs(corpus):
    return run_epochs(corpus)


def keys_used(corpus, steps):
    tables = open_sources(corpus.shards())
    used = Counter()
    for batch in itertools.chain.from_iterable(step.micro_batches for step in steps):
        for (source, epoch, number), bad in zip(batch.sample_ids.tolist(), batch.bad_segments.tolist()):
            if not bad:
                used[tables[source].entry(number).key, epoch] += 1
    return used


def test_every_sample_once_per_epoch_and_every_bad_one_named(corpus, epochs):
    used = keys_used(corpus, epochs)
    bad = Counter(record.key for step in epochs for record in step.stats.records)
    assert bad == dict.fromkeys(corpus.bad_keys, EPOCHS)
    assert set(used.values()) == {1}
    assert len(used) == EPOCHS * (corpus.num_many + corpus.num_few - len(corpus.bad_keys) - 1)
    filtered = sum((Counter(step.stats.filtered) for step in epochs), Counter())
    assert filtered == {"longer than a row": EPOCHS}, "a choice of the config is no bad data"
    assert not any(key == "long_row" for key, _ in used)


def test_stats_add_up(corpus, epochs):
    used = keys_used(corpus, epochs)
    assert sum(step.stats.samples for step in epochs) == len(used)
    by_source = Counter()
    for step in epochs:
        by_source.update(step.stats.samples_per_source)
        assert step.stats.bad_samples == len(step.stats.records)
        assert step.stats.row_tokens == 5 * 64
        assert step.stats.useful_tokens == sum(int((b.segment_ids >= 0).sum()) for b in step.micro_batches)
    num_good = corpus.num_many - len(corpus.bad_keys) - 1
    assert by_source == {"many": EPOCHS * num_good, "few": EPOCHS * corpus.num_few}
    assert epochs[-1].state.quarantined == EPOCHS * len(corpus.bad_keys)
    assert [record.step for step in epochs for record in step.stats.records] == [
        step.state.step for step in epochs for _ in step.stats.records
    ]


def test_reasons_say_what_is_wrong(epochs):
    reasons = {record.key: (record.reason, record.member) for step in epochs for record in step.stats.records}
    for key, words in {
        "bad_text": "UTF-8",
        "bad_meta": "not JSON",
        "bad_long_text": "allows 600",
        "bad_long_audio": "1.50 s long",
        "bad_image_is_a_pickle": "not an image",
        "bad_chat_item": "no further image",
        "bad_target": "target group: `group` must be a finite float32 number, got 'seven'",
        "late_chat": "cannot be decoded",
        "bad_blank": "blank",
        "bad_nothing": "none of audio, image, text",
        "late_image": "cannot be decoded",
        "late_audio": "audio",
    }.items():
        assert words in reasons[key][0], reasons[key]
    assert reasons["late_image"][1] == "late_image.png"


def test_late_ones_keep_their_slot_and_the_others_are_left_out(corpus, epochs):
    tables = open_sources(corpus.shards())
    slots = Counter()
    for batch in itertools.chain.from_iterable(step.micro_batches for step in epochs):
        for (source, _, number), bad in zip(batch.sample_ids.tolist(), batch.bad_segments.tolist()):
            if bad:
                slots[tables[source].entry(number).key] += 1
    assert slots == {"late_image": EPOCHS, "late_audio": EPOCHS, "late_chat": EPOCHS}


def test_pickles_are_never_loaded(corpus, epochs, tmp_path):
    assert epochs
    assert not corpus.canary.exists()
    pickle.loads(pickle.dumps(Canary(str(tmp_path / "sings"))))
    assert (tmp_path / "sings").exists(), "the canary is dead: this test proves nothing"


def test_used_up_lanes_give_empty_rows_for_ever(corpus, epochs):
    last = epochs[-1]
    assert last.state.exhausted
    assert not epochs[-3].state.exhausted
    assert last.stats.samples == last.stats.useful_tokens == 0
    assert all(batch.num_segments == 0 and len(batch.input_ids) == 64 for batch in last.micro_batches)


def test_count_steps_is_exact(corpus, epochs):
    arguments = corpus.shards(epochs=EPOCHS), SAMPLES, corpus.batches()
    counted = count_steps(*arguments, seed=7, lengths=LENGTHS)
    assert counted == max(
        number for number, step in enumerate(epochs, 1) if step.stats.row_tokens and step.stats.samples
    )
    assert epochs[counted - 1].stats.samples > 0
    assert epochs[counted].stats.samples == 0


def test_steps_without_end_cannot_be_counted(corpus):
    with pytest.raises(ConfigError, match=r"missing for \['many', 'few'\]"):
        count_steps(corpus.shards(), SAMPLES, corpus.batches(), seed=7, lengths=LENGTHS)


def test_more_ranks_than_lanes(corpus):
    with closing(corpus.loader(rank=6, world_size=8)) as loader:
        step = next(iter(loader))
    assert len(step.micro_batches) == 1
    assert step.micro_batches[0].num_segments == 0
    assert step.state.exhausted


def test_waste_is_a_warning_of_rank_zero(corpus, caplog):
    with caplog.at_level(logging.WARNING, logger="trichord"):
        corpus.loader(rank=0, world_size=2, micro_rows=2)
        corpus.loader(rank=1, world_size=2, micro_rows=2)
    assert [r.message for r in caplog.records if "stay empty" in r.message] == [
        "3 of 8 rows per step stay empty (38 %): batches.rows_per_step 5 is no multiple of world size 2 x "
        "batches.micro_rows 2"
    ]


def test_augmentation_can_be_switched_off_and_lengths_stay(corpus):
    with closing(corpus.loader()) as changing, closing(corpus.loader(augment=False)) as plain:
        pairs = list(itertools.islice(zip(changing, plain), 6))
    for with_it, without in pairs:
        for a, b in zip(with_it.micro_batches, without.micro_batches):
            assert (a.input_ids == b.input_ids).all()
            assert a.audio_offsets == b.audio_offsets
    assert any((a.micro_batches[0].pixels != b.micro_batches[0].pixels).any() for a, b in pairs)


def test_a_tower_the_model_lacks_is_not_read(corpus):
    lengths = ItemLengths(image=None, audio=LENGTHS.audio)
    loader = Loader(corpus.shards(epochs=1), SAMPLES, corpus.batches(), seed=7, lengths=lengths)
    with closing(loader):
        steps = list(itertools.islice(loader, 30))
    assert loader.state.exhausted
    assert all(batch.num_images == 0 for step in steps for batch in step.micro_batches)
    used = {key for key, _ in keys_used(corpus, steps)}
    assert "late_image" in used  # its caption is good, and its picture is nobody's business
    assert "s0004" not in used  # an image alone


# ---- states ----


def states_of(corpus, world_size, steps=2, **options):
    states = []
    for rank in range(world_size):
        with closing(corpus.loader(rank, world_size, **options)) as loader:
            states.append(list(itertools.islice(loader, steps))[-1].state)
    return states


def test_a_rank_holds_its_own_lanes_and_merging_needs_all(corpus):
    first, second = states_of(corpus, 2)
    assert (sorted(first.lanes), sorted(second.lanes)) == ([0, 2, 4], [1, 3])
    assert sorted(LoaderState.merge([second, first]).lanes) == [0, 1, 2, 3, 4]
    with pytest.raises(CheckpointError, match=r"lanes \[1, 3\] are missing"):
        LoaderState.merge([first])
    with pytest.raises(CheckpointError, match=r"merge the states"):
        first.digest()
    with pytest.raises(CheckpointError, match=r"lanes \[0, 2, 4\] are in the loader states of two"):
        LoaderState.merge([first, first])
    with pytest.raises(CheckpointError, match="steps 2 and 3"):
        LoaderState.merge([first, states_of(corpus, 2, steps=3)[1]])


def test_state_dict_goes_round_and_replaces_what_ran(corpus):
    with closing(corpus.loader(num_workers=1)) as loader:
        steps = iter(loader)
        fields = next(steps).state.to_json()
        expected = next(steps).state.digest()
        next(steps)
        loader.load_state_dict(fields)
        assert next(iter(loader)).state.digest() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 72}, "row_tokens 64, now it is 72"),
        ({"rows_per_step": 6}, "rows_per_step 5, now it is 6"),
        ({"seed": 8}, "seed 7, now it is 8"),
    ],
)
def test_state_of_another_packing_is_refused(corpus, change, message):
    state = states_of(corpus, 1)[0]
    with pytest.raises(CheckpointError, match=message):
        corpus.loader(state=state, **change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda fields: fields | {"version": 99}, "version 99, this Trichord reads 2"),
        (lambda fields: {k: v for k, v in fields.items() if k != "lanes"}, "damaged"),
        (lambda fields: fields | {"lanes": {"0": {"row": 1}}}, "damaged"),
    ],
)
def test_damaged_state_is_refused(corpus, damage, message):
    fields = states_of(corpus, 1)[0].to_json()
    with pytest.raises(CheckpointError, match=message):
        LoaderState.from_json(damage(fields))


def test_rank_outside_the_world_is_refused(corpus):
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        corpus.loader(rank=2, world_size=2)


def test_quarantine_digest_follows_what_was_left_out(corpus, epochs):
    digests = [step.state.quarantine_digest() for step in epochs]
    for before, after, step in zip(digests, digests[1:], epochs[1:]):
        assert (before == after) == (not step.stats.records)


# ---- faults of workers ----


@pytest.mark.parametrize("num_workers", [0, 2])
def test_storage_fault_surfaces_as_data_error_with_shard_and_key(corpus, monkeypatch, num_workers):
    from trichord.samples import sample as sample_module

    real = sample_module.read_ref

    def failing(shard, ref, max_bytes):
        if ref.ext in ("png", "jpg"):
            raise DataError(f"reading member {ref.name!r} of shard {shard}: failed 6 times")
        return real(shard, ref, max_bytes)

    monkeypatch.setattr(sample_module, "read_ref", failing)
    message = r"^reading member '[sf]\d+\.(png|jpg)' of shard .*/part-\d+\.tar: failed 6 times$"
    with closing(corpus.loader(num_workers=num_workers)) as loader, pytest.raises(DataError, match=message):
        list(itertools.islice(loader, 20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fault_in_the_code_keeps_its_trace_and_names_the_sample(corpus, monkeypatch, num_workers):
    from trichord.samples import sample as sample_module

    monkeypatch.setattr(sample_module, "decode_image", lambda *args: 1 // 0)
    message = r"(?s)decoding member '[sf]\d+\.\w+' of shard .*part-\d+\.tar.*ZeroDivision"
    with closing(corpus.loader(num_workers=num_workers)) as loader, pytest.raises(RuntimeError, match=message):
        list(itertools.islice(loader, 20))


@pytest.mark.timeout(30)
def test_windows_without_a_good_sample_cost_empty_rows_not_a_hang(corpus):
    """Endless sources all of whose samples are bad: steps are taken, so that the run can count and stop."""
    shards = corpus.shards()
    hard = tuple(
        source.model_copy(update={"require": ("image", "audio", "text", "image")}) for source in shards.sources
    )
    samples = SAMPLES.model_copy(update={"text": SAMPLES.text.model_copy(update={"max_chars": 1})})
    loader = Loader(
        shards.model_copy(update={"sources": hard}), samples, corpus.batches(), seed=7, lengths=LENGTHS, augment=False
    )
    with closing(loader):
        steps = [step for step, _ in zip(loader, range(3))]
    assert [step.stats.samples for step in steps] == [0, 0, 0]
    assert all(step.stats.bad_samples > 0 for step in steps)
    assert len({step.state.digest() for step in steps}) == 3
