"""The modality rule is what keeps the job alive: without it, a rank that lacks images breaks or hangs every stage."""

import re
import time

import pytest
import tiny
import torch
from ranks import RankError, run_ranks

from trichord.batches.rows import build_row
from trichord.engine.config import EngineConfig
from trichord.fusion.model import Trichord
from trichord.objectives.config import ObjectivesConfig

pytestmark = pytest.mark.distributed

NEXT_TOKEN = ObjectivesConfig.model_validate({"next_token": {}})
TIMEOUT_S = 8.0


def break_the_rule() -> None:
    """Towers and connectors run only where there are items, as most training code does it."""
    run_vision, run_audio = Trichord._run_vision, Trichord._run_audio
    Trichord._run_vision = lambda self, batch: run_vision(self, batch) if batch.num_images else None
    Trichord._run_audio = lambda self, batch: run_audio(self, batch) if batch.num_audios else None


def train_with_missing_modality(stage: int, rule: bool) -> list:
    if not rule:
        break_the_rule()
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    config = EngineConfig(
        zero_stage=stage, precision="fp32", timeout_s=TIMEOUT_S, deepspeed={"zero_optimization": zero}
    )
    facts, engine, stepper = tiny.make_stepper(config, 2, NEXT_TOKEN)
    own_rows = tiny.make_row
    history = []
    for step in range(4):
        # At step 0 every row has both modalities on every rank; from step 1 on rank 1 has no image.
        tiny.make_row = (lambda row, step: own_rows(2, 1)) if step == 0 else own_rows
        history += tiny.train_steps(facts, engine, stepper, config, 2, range(step, step + 1))
    if rule:
        take_steps_without_rows(facts, engine, stepper)
    return history


def take_steps_without_rows(facts, engine, stepper) -> None:
    """Rank 1 has no sample, then no rank has: only the second changes nothing, momentum and decay neither."""
    own_rows, empty = tiny.make_row, build_row([], [], tiny.FORM)
    changed = []
    for with_rows in (1, 0):
        tiny.make_row = own_rows if facts.rank < with_rows else lambda row, step: empty
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        result = stepper.run(tiny.micro_batches(5, facts.rank, facts.world_size, 2), {"open_lanes": 1.0})
        assert (result.is_empty, bool(result.losses)) == (not with_rows, bool(with_rows))
        assert result.counts["open_lanes"] == facts.world_size
        after = engine.module.parameters()
        changed.append(any(not torch.equal(old, new) for old, new in zip(before, after)))
    assert changed[1] is False
    if engine.zero_optimization_stage() < 3:  # whose parameters are elsewhere between two steps
        assert changed[0] is True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_rule_all_stages_go_on(stage):
    by_rank = run_ranks(2, train_with_missing_modality, stage, True)
    assert len(by_rank[0]) == 4
    assert by_rank[0] == by_rank[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_without_the_rule_stages_1_and_2_fail(stage):
    with pytest.raises(RankError) as caught:
        run_ranks(2, train_with_missing_modality, stage, False, timeout_s=60)
    assert_the_collectives_failed(caught.value)


@pytest.mark.slow
def test_without_the_rule_stage_3_hangs_until_the_collective_times_out():
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(2, train_with_missing_modality, 3, False, timeout_s=90)
    assert time.monotonic() - started > TIMEOUT_S
    assert_the_collectives_failed(caught.value)
    assert any("imed out" in text or "timeout" in text for text in caught.value.failures.values()), caught.value


def assert_the_collectives_failed(error: RankError) -> None:
    """Not, say, a mistake in this test's patch."""
    for text in error.failures.values():
        assert re.search(r"gloo|imed out|timeout|Connection|exit -6", text), text
