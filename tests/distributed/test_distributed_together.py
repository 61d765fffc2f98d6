"""What rank 0 decides for all, where that takes longer than any collective may."""

import time

import pytest
from ranks import RankError, run_ranks

from trichord.core.errors import DataError
from trichord.engine import together
from trichord.engine.build import start_process_group
from trichord.engine.together import decide_on_rank_0

pytestmark = pytest.mark.distributed

LIMIT_S = 2.0


def decide_late():
    start_process_group(LIMIT_S)
    together._LOOK_AGAIN = together.timedelta(seconds=1)  # so that a look in vain is part of the case
    return decide_on_rank_0(lambda: (time.sleep(2 * LIMIT_S), "decided")[1]), decide_on_rank_0(lambda: 2)


def refuse_late():
    start_process_group(LIMIT_S)

    def refuse():
        time.sleep(2 * LIMIT_S)
        raise DataError("no shard is there")

    decide_on_rank_0(refuse)


def test_a_decision_may_take_longer_than_a_collective():
    assert run_ranks(2, decide_late, timeout_s=60) == [("decided", 2)] * 2


def test_a_late_refusal_reaches_all():
    with pytest.raises(RankError) as raised:
        run_ranks(2, refuse_late, timeout_s=60)
    assert ["no shard is there" in said for said in raised.value.failures.values()] == [True, True]
