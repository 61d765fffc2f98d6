"""Optimizers beyond torch's plain ones: the same on any split, and they go on from a checkpoint bit for bit."""

import pytest
from ranks import run_ranks
from test_distributed_checkpoint import FIRST_STEPS, load_and_train, round_trip, train_and_save, whole
from test_distributed_equality import LIMIT, largest_difference, options
from tiny import train_cases

pytestmark = pytest.mark.distributed

MOMENTS = {"param", "exp_avg", "exp_avg_sq"}
STEPS = 6
ROOMS = {"rooms": {"vision": {"lr_ratio": 0.5, "layer_decay": 0.5}, "heads": {"weight_decay": 0.0}}}
CHOICES = {
    "bf16 moments": {"optimizer_states": "bf16", **ROOMS},
    "muon": {"optimizer": "muon", "muon": {"lr": 0.02}, **ROOMS},
}


def test_each_is_the_same_on_any_split():
    def cases(stages):
        return [({**options(stage), **choice}, 2) for choice in CHOICES.values() for stage in stages]

    alone = run_ranks(1, train_cases, cases([0, 3]), STEPS)[0]
    by_rank = run_ranks(2, train_cases, cases([1, 2, 3]), STEPS, timeout_s=280)[0]
    assert len({str(history) for history in alone[::2]}) == len(CHOICES), "two of the choices did the same"
    differences = {
        (name, split): largest_difference(history, alone[2 * number])
        for number, name in enumerate(CHOICES)
        for split, history in zip(
            ("1 x stage 3", "2 x stage 1", "2 x stage 2", "2 x stage 3"),
            (alone[2 * number + 1], *by_rank[3 * number : 3 * number + 3]),
            strict=True,
        )
    }
    print({case: f"{value:.1e}" for case, value in differences.items()})
    assert {case: value for case, value in differences.items() if not value <= LIMIT} == {}


@pytest.mark.parametrize(("name", "kinds"), [("bf16 moments", MOMENTS), ("muon", MOMENTS | {"momentum_buffer"})])
def test_each_goes_on_from_a_checkpoint(tmp_path, name, kinds):
    """Bit for bit on the same split, alike on another."""
    round_trip(tmp_path, (2, 2), [(1, 3)], CHOICES[name], kinds)
    again = run_ranks(2, load_and_train, str(tmp_path), 2, CHOICES[name])
    undisturbed = run_ranks(2, train_and_save, str(tmp_path / "again"), 2, CHOICES[name])
    assert [history for _, history in again] == [history for _, history in undisturbed]
    before, after = (whole([state for state, _ in results]) for results in (undisturbed, again))
    assert all((after[key] == before[key]).all() for key in before)
    assert [state["step"] for state, _ in again] == [FIRST_STEPS] * 2


EIGHT = {"optimizer": "adamw_8bit"}


def test_8_bits_go_on_bit_for_bit_on_the_same_split_and_closely_on_another(tmp_path):
    """Blocks begin elsewhere on another split, so that moments are rounded anew."""
    exact = run_ranks(2, train_and_save, str(tmp_path / "exact"), 2, {})
    wrote = run_ranks(2, train_and_save, str(tmp_path), 2, EIGHT)
    again = run_ranks(2, load_and_train, str(tmp_path), 2, EIGHT)
    before, after = (whole([state for state, _ in results]) for results in (wrote, again))
    assert {kind for _, kind in before} == MOMENTS
    assert all((after[key] == before[key]).all() for key in before)
    assert [history for _, history in again] == [history for _, history in wrote]
    assert wrote[0][1] != exact[0][1], "nothing was rounded: the model is too small for the test"
    assert largest_difference(wrote[0][1], exact[0][1]) < 0.05
    ((state, elsewhere),) = run_ranks(1, load_and_train, str(tmp_path), 3, EIGHT)
    assert state["step"] == FIRST_STEPS
    assert largest_difference(elsewhere, wrote[0][1]) < 0.05
