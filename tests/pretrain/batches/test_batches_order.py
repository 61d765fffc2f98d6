"""The promise: the global batches depend on config, seed and step alone, on any split and over any stop."""

import itertools
import json
from contextlib import ExitStack, closing

import pytest
from batches_corpus import hash_row

from trichord.batches.loader import LoaderState

LANES, ROW_TOKENS = 5, 64


def global_batches(corpus, steps, world_size=1, num_workers=0, micro_rows=1, state=None, **options):
    """Per step: the hash of every row in lane order, and the merged state after it. Ranks run one after the other."""
    per_rank, states = [], []
    for rank in range(world_size):
        loader = corpus.loader(
            rank, world_size, state, micro_rows=micro_rows, num_workers=num_workers, rows_per_step=LANES, **options
        )
        rank_rows, rank_states = [], []
        with closing(loader):
            for step in itertools.islice(loader, steps):
                assert len(step.micro_batches) == loader.micro_steps
                for batch in step.micro_batches:
                    batch.check()
                    assert batch.input_ids.shape == (micro_rows * ROW_TOKENS,)
                places = [(batch, row) for batch in step.micro_batches for row in range(micro_rows)]
                rank_rows.append([hash_row(batch, row, ROW_TOKENS) for batch, row in places])
                rank_states.append(step.state)
        per_rank.append(rank_rows)
        states.append(rank_states)
    rows = [[per_rank[lane % world_size][step][lane // world_size] for lane in range(LANES)] for step in range(steps)]
    return rows, [LoaderState.merge(list(of_ranks)) for of_ranks in zip(*states)]


def assert_same(result, expected, offset=0):
    rows, states = result
    for step, (got, want) in enumerate(zip(rows, expected[0][offset:])):
        assert got == want, f"step {offset + step + 1} differs"
    for got, want in zip(states, expected[1][offset:]):
        assert got.to_json() == want.to_json()


@pytest.fixture(scope="module")
def undisturbed(corpus):
    return global_batches(corpus, 41)


@pytest.fixture(scope="module")
def long_undisturbed(corpus):
    return global_batches(corpus, 200)


@pytest.mark.parametrize(("world_size", "num_workers", "micro_rows"), [(1, 1, 5), (2, 0, 1), (3, 2, 2), (4, 1, 1)])
def test_first_batches_are_the_same_on_any_split(corpus, undisturbed, world_size, num_workers, micro_rows):
    assert_same(global_batches(corpus, 25, world_size, num_workers, micro_rows), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_first_200_batches_are_the_same_on_any_split(corpus, long_undisturbed, world_size, num_workers):
    assert_same(global_batches(corpus, 200, world_size, num_workers, 1 + num_workers % 2), long_undisturbed)


def test_the_order_depends_on_the_seed_and_the_rows_are_not_all_alike(corpus, undisturbed):
    other = global_batches(corpus, 3, seed=8)
    assert other[0][0] != undisturbed[0][0]
    assert other[1][0].digest() != undisturbed[1][0].digest()
    assert len({row for rows in undisturbed[0] for row in rows}) == 41 * LANES


@pytest.mark.parametrize(("stop", "before", "after"), [(1, (3, 0), (2, 1)), (7, (2, 2), (4, 0)), (29, (4, 1), (1, 2))])
def test_resume_on_another_split_goes_on_the_same(corpus, undisturbed, stop, before, after):
    stopped = global_batches(corpus, stop, *before)[1][-1]
    assert any(cursor.row > 0 for cursor in stopped.lanes.values()), "no lane stopped inside a window"
    state = LoaderState.from_json(json.loads(json.dumps(stopped.to_json())))
    assert_same(global_batches(corpus, 12, *after, state=state), undisturbed, offset=stop)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 5, 11, 13, 17, 60, 61, 62, 63, 150])
def test_resume_after_many_steps(corpus, long_undisturbed, stop):
    state = long_undisturbed[1][stop - 1]
    assert_same(global_batches(corpus, 30, 1 + stop % 4, stop % 3, state=state), long_undisturbed, offset=stop)


def test_stopping_throws_away_what_workers_have_read_ahead(corpus, undisturbed):
    with closing(corpus.loader(num_workers=2, prefetch_steps=6)) as loader:
        first = list(itertools.islice(loader, 3))
        again = list(itertools.islice(loader, 2))  # a new iterator: goes on after what was handed out
    states = [step.state for step in first + again]
    assert [state.digest() for state in states] == [state.digest() for state in undisturbed[1][:5]]
    assert loader.state.step == 5


def test_digest_covers_every_step_also_empty_ones(corpus):
    with ExitStack() as stack:
        loader = stack.enter_context(closing(corpus.loader(epochs=1)))
        digests = [step.state.digest() for step in itertools.islice(loader, 60)]
    assert loader.state.exhausted
    assert len(set(digests)) == 60
