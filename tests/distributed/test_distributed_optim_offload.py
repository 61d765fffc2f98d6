"""Adam in host memory: DeepSpeed's own and torch's do the same, and each goes on from the other's checkpoint."""

import pytest
import tiny
from ranks import RankError, run_ranks
from test_distributed_checkpoint import FIRST_STEPS, engine_config, load_and_train, train_and_save, whole
from test_distributed_equality import largest_difference

pytestmark = pytest.mark.distributed

LIMIT = 1e-5  # relative, of losses and norms of the three steps after the change; 2.5e-7 was measured


def break_the_build():
    """Rank entry: a machine without a compiler."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def load(self, verbose=True):
        raise OSError("g++ is not there\nand more lines")

    CPUAdamBuilder.load = load
    tiny.make_stepper(engine_config(2, {"offload": "optimizer"}), 8)


def test_a_machine_that_cannot_build_it_is_told_what_to_do():
    with pytest.raises(RankError, match=r"could not be built here: g\+\+ is not there; .*offload_optimizer=torch"):
        run_ranks(1, break_the_build)


def test_others_in_host_memory_do_as_on_the_device():
    others = ({"offload_optimizer": "torch"}, {"optimizer": "muon"})
    cases = [({**plain(2), **other, "offload": offload}, 4) for other in others for offload in ("none", "optimizer")]
    adamw, adamw_in_host, muon, muon_in_host = run_ranks(2, tiny.train_cases, cases, 4)[0]
    assert adamw == adamw_in_host != muon
    assert muon == muon_in_host


def plain(stage: int) -> dict:
    return {"zero_stage": stage, "precision": "fp32", "lr": 5e-3, "timeout_s": 600.0}


@pytest.mark.slow  # builds a C++ extension, minutes at first
@pytest.mark.timeout(1500)
def test_deepspeed_s_adam_takes_over_from_torch_s_and_hands_back(tmp_path):
    offloaded = {"offload": "optimizer", "timeout_s": 1200.0}
    hands_back = (2, {**offloaded, "optimizer": "adamw"}), (3, {"optimizer": "adamw"})
    takes_over = (1, {"optimizer": "adam"}), (3, {**offloaded, "optimizer": "adam"})
    for number, (writer, reader) in enumerate([hands_back, takes_over]):
        folder = str(tmp_path / str(number))
        wrote = run_ranks(2, train_and_save, folder, *writer, timeout_s=1300)
        read = run_ranks(2, load_and_train, folder, *reader, timeout_s=1300)
        before, after = whole([state for state, _ in wrote]), whole([state for state, _ in read])
        assert {kind for _, kind in before} == {"param", "exp_avg", "exp_avg_sq"}
        assert all((after[key] == before[key]).all() for key in before)
        assert [state["step"] for state, _ in read] == [FIRST_STEPS] * 2
        worst = largest_difference(read[0][1], wrote[0][1])
        print(f"{writer}, {reader}: largest relative difference {worst:.1e}")
        assert worst <= LIMIT
