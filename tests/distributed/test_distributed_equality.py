"""The same steps on any split: ranks, ZeRO stage, accumulation; ranks lack images or audio; contrastive included."""

import itertools

import pytest
from ranks import run_ranks
from tiny import train_cases

pytestmark = pytest.mark.distributed

STEPS = 10
ROWS = 16
LIMIT = 1e-5  # relative, fp32
MICRO_ROWS = {1: (16, 4), 2: (8, 2), 4: (4, 1)}  # accumulation 1 and 4


def options(stage: int) -> dict:
    chosen = {"zero_stage": stage, "precision": "fp32", "lr": 5e-3, "timeout_s": 60.0, "max_grad_norm": 0.5}
    if stage == 2:  # several messages in a backward pass, which a model as small as this would never fill
        chosen["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
    if stage == 3:
        chosen["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return chosen


@pytest.fixture(scope="module")
def reference():
    """One rank, stage 0, the whole batch at once."""
    return run_ranks(1, train_cases, [(options(0), 16)], STEPS, ROWS)[0][0]


def largest_difference(history, reference):
    return max(
        abs(ours[name] - theirs[name]) / abs(theirs[name]) if theirs[name] else float(ours[name] != 0)
        for ours, theirs in zip(history, reference, strict=True)
        for name in theirs
    )


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_split_gives_the_same_losses_and_norms(reference, world_size):
    splits = list(itertools.product((0, 1, 2, 3), MICRO_ROWS[world_size]))
    cases = [(options(stage), micro_rows) for stage, micro_rows in splits]
    by_rank = run_ranks(world_size, train_cases, cases, STEPS, ROWS, timeout_s=280)
    assert all(histories == by_rank[0] for histories in by_rank)
    differences = {
        f"stage {stage}, {micro_rows} micro rows": largest_difference(history, reference)
        for (stage, micro_rows), history in zip(splits, by_rank[0], strict=True)
    }
    print(f"{world_size} ranks:", {split: f"{value:.1e}" for split, value in differences.items()})
    assert {split: value for split, value in differences.items() if not value <= LIMIT} == {}


RATES = [
    {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
    {"optimizer": "rmsprop", "momentum": 0.5, "lr": 1e-3},
    {"optimizer": "adam"},
    {
        "rooms": {
            "vision": {"lr_ratio": 0.1, "layer_decay": 0.5},
            "heads": {"weight_decay": 0.0, "schedule": "constant"},
        }
    },
]


def test_optimizers_and_rates_per_room_are_the_same_on_any_split():
    def cases(stages):
        return [({**options(stage), **rates}, 2) for rates in RATES for stage in stages]

    single = run_ranks(1, train_cases, cases([0]), 6)[0]
    by_rank = run_ranks(2, train_cases, cases([1, 3]), 6, timeout_s=280)
    assert len({str(history) for history in single}) == len(RATES), "two of the choices did the same"
    for number, history in enumerate(by_rank[0]):
        assert largest_difference(history, single[number // 2]) <= LIMIT, RATES[number // 2]


def test_the_steps_learn_something(reference):
    first, last = reference[0], reference[-1]
    assert last["next_token"] < 0.95 * first["next_token"]
    assert first["grad_norm"] > 0.5, "clipping never acts: the case does not cover it"
