"""Who is stuck, from what the ranks say of themselves; how it is told for two ranks and for four thousand."""

import pytest

from trichord.engine.config import EngineConfig
from trichord.engine.stuck import MAX_LINES, Sight, describe, stuck_ranks, table
from trichord.engine.watch import beat_every_s


def sight(rank, phase="count", collectives=100, **facts):
    return Sight(
        rank,
        **{"step": 7, "phase": phase, "age_s": 40.0, "idle_s": 40.0, "collectives": collectives, "holds": "text"}
        | facts,
    )


def test_ranks_behind_in_collectives_are_what_the_others_wait_for():
    sights = [sight(rank) for rank in range(8)]
    sights[3] = sight(3, "data wait", 99, workers=("worker 1: decode, member 7.jpg, for 40 s",))
    assert stuck_ranks(sights) == [3]
    said = describe(sights, [3], 40)
    assert said.startswith(
        "step 8 has not moved for 40 s: rank 3 is in data wait (worker 1: decode, member 7.jpg, for 40 s)"
    )
    assert said.endswith("entered 99 collectives, the others 100")


def test_with_equal_collectives_the_odd_phase_is_named():
    sights = [sight(rank, "backward, micro step 1") for rank in range(8)]
    sights[5] = sight(5, "forward, micro step 1")
    assert stuck_ranks(sights) == [5]


def test_where_all_are_alike_nobody_is_blamed():
    sights = [sight(rank) for rank in range(8)]
    assert stuck_ranks(sights) == []
    assert "all 8 ranks are in count, after 100 collectives each: look at the network" in describe(sights, [], 40)


def test_half_and_half_blames_nobody():
    sights = [sight(rank, ("forward", "backward")[rank % 2]) for rank in range(8)]
    assert stuck_ranks(sights) == []


def test_a_rank_without_a_modality_stands_out_in_the_table():
    sights = [sight(rank, holds="text+images") for rank in range(4)]
    sights[2] = sight(2, holds="text")
    assert table(sights)[0].startswith("ranks 2: ")
    assert table(sights)[1].startswith("ranks 0-1, 3: ")


def test_the_table_of_a_large_job_is_short_and_has_the_odd_ones_first():
    sights = [sight(rank) for rank in range(4096)]
    for rank in range(0, 4096, 100):
        sights[rank] = sight(rank, f"decode {rank}")
    lines = table(sights)
    assert len(lines) == MAX_LINES + 1
    assert lines[0].startswith("ranks 0: decode 0")
    assert lines[-1] == f"and {4096 - MAX_LINES} ranks more"
    assert all(len(line) < 300 for line in lines)


def test_a_sight_survives_the_store():
    one = sight(3, workers=("a", "b"))
    assert Sight.from_json(one.to_json()) == one


@pytest.mark.parametrize("world_size", [2, 64, 1000, 1500])
def test_the_store_sees_no_more_requests_in_a_large_job(world_size):
    assert 2 * world_size / beat_every_s(world_size, timeout_s=30.0) <= 600


@pytest.mark.parametrize("world_size", [2, 1000, 100_000])
def test_a_neighbour_is_looked_at_often_enough_to_be_judged(world_size):
    assert beat_every_s(world_size, timeout_s=20.0) <= 4.0


def test_the_verdict_comes_before_the_collectives_give_up():
    assert EngineConfig().stuck_limit_s == 900
    assert EngineConfig(timeout_s=60, stuck_after_s=20).stuck_limit_s == 20
    with pytest.raises(ValueError, match=r"stuck_after_s 60 must be below timeout_s 60"):
        EngineConfig(timeout_s=60, stuck_after_s=60)
