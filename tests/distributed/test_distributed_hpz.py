"""hpZ: a second copy of ZeRO-3's slices inside a node. Nothing but the traffic changes, and its groups have the run's
time limit too."""

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from trichord.engine.config import EngineConfig

pytestmark = pytest.mark.distributed


def train(hpz_ranks: int) -> tuple[list, int, set[float]]:
    """Losses, the number of process groups, and their time limits in seconds."""
    zero = {"stage3_param_persistence_threshold": 0}
    options = {"zero_stage": 3, "precision": "fp32", "timeout_s": 77.0, "hpz_ranks": hpz_ranks}
    config = EngineConfig.model_validate(options | {"deepspeed": {"zero_optimization": zero}})
    facts, engine, stepper = tiny.make_stepper(config, 2)
    history = tiny.train_steps(facts, engine, stepper, config, 2, range(3))
    groups = list(dist.distributed_c10d._world.pg_map)
    limits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    return history, len(groups), limits


def test_the_same_losses_and_a_time_limit_on_every_group():
    plain, hpz = run_ranks(2, train, 1), run_ranks(2, train, 2)
    for (expected, groups, limits), (found, more_groups, hpz_limits) in zip(plain, hpz, strict=True):
        assert found == expected
        assert more_groups > groups, "hpZ made no group of its own"
        assert limits == hpz_limits == {77.0}


def test_a_number_that_does_not_divide_the_job_is_refused():
    with pytest.raises(RankError, match="hpz_ranks is 3, which does not divide the 2 ranks of this job"):
        run_ranks(2, train, 3)
