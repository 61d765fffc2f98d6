"""Volumes and times of collectives: rings by hand, and the volumes of the ZeRO paper."""

import pytest

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.planning.comms import Collective, Features, collectives
from trichord.planning.gpus import CATALOG, Fabric, find_gpu
from trichord.planning.zero import Parameter, Zero

PSI = 10**9
FABRIC = Fabric(8, link_gb_per_s=400, node_gb_per_s=200, share=0.5, alpha_inside_s=1e-6, alpha_between_s=1e-5)


def sent(stage: int, accumulation: int = 1, features=None, ranks=64) -> float:
    """Bytes that a rank sends, in units of the bf16 weights."""
    engine = EngineConfig(zero_stage=stage, precision="bf16" if stage else "autocast_bf16")
    parameters = [Parameter("trunk", PSI // 100, True, 1, True, True, False) for _ in range(100)]
    found = collectives(parameters, Zero.of(engine, ranks), accumulation, features)
    return sum(c.sent(ranks) for c in found) / (ranks - 1) * ranks / PSI / (2 if stage else 4)


def test_the_volumes_of_the_zero_paper():
    """Section 7: without ZeRO and up to stage 2 twice the model, at stage 3 three times, less what stays gathered."""
    assert sent(0) == pytest.approx(2)
    assert sent(1) == pytest.approx(2)
    assert sent(2) == pytest.approx(2)
    kept = 0.5  # of 1e9 weights, those whose next use is within 1e9 elements
    assert sent(3) == pytest.approx(3 - kept)


def test_accumulation_costs_stage_2_and_3_but_not_1():
    assert sent(1, accumulation=4) == pytest.approx(2)
    assert sent(2, accumulation=4) == pytest.approx(4 + 1)
    assert sent(3, accumulation=4) == pytest.approx(4 * 2.5)


def test_one_gpu_sends_nothing():
    assert collectives([], Zero.of(EngineConfig(), 1), 4, None) == []


def test_features_of_all_ranks_are_exchanged():
    found = collectives([], Zero.of(EngineConfig(zero_stage=1), 4), 1, Features(slots=32, embed_dim=64, modalities=2))
    sizes = {c.what: c.bytes for c in found}
    assert sizes["features"] == 4 * 32 * 4 * 64 * 2 + 32 * 4 * 32
    assert sizes["feature gradients"] == 4 * (4 * 32 + 1) * 64 * 2


def sizes_of(parameters, accumulation=1, ranks=2, features=None, **engine) -> dict[str, tuple[int, int | None]]:
    overlay = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}}
    config = EngineConfig(**engine, deepspeed=overlay if engine["zero_stage"] == 3 else {})
    found = collectives(parameters, Zero.of(config, ranks), accumulation, features)
    return {c.what: (c.bytes, c.ranks) for c in found}


def test_with_hpz_only_the_first_gather_of_what_learns_leaves_the_node():
    """16 bytes of weights that learn and 8 that do not; their second copy outlives the update."""
    parameters = [Parameter("trunk", 8, True, 1, True, True, False), Parameter("trunk", 4, False, 1, True, True, False)]
    sizes = sizes_of(parameters, 3, ranks=8, zero_stage=3, precision="bf16", hpz_ranks=4)
    assert sizes["weights, first"] == (16, None)
    assert sizes["weights, forward"] == (3 * 24 - 16, 4)
    assert sizes["weights, backward"] == (3 * 24, 4)


def test_matrices_of_muon_meet_on_a_rank_and_go_back():
    """fp32, two ranks. Stage 3: rank 0 puts in half of each of three, and has two of them to hand back. Stage 1: a line
    of 28 is cut at 14, in the second matrix, which begins at 10."""
    sizes = (10, 12, 6)
    parameters = [Parameter("trunk", size, True, 1, True, True, False) for size in sizes]
    options = {"precision": "fp32", "optimizer": "muon"}
    assert sizes_of(parameters, zero_stage=3, **options)["matrices of muon"] == (4 * (14 + 10 + 6), None)
    assert sizes_of(parameters, zero_stage=1, **options)["matrices of muon"] == (4 * (4 + 12), None)
    assert "matrices of muon" not in sizes_of(parameters, zero_stage=0, **options)


def test_an_all_to_all_has_peers_in_the_node_and_a_part_of_the_network_between_nodes():
    swap = Collective("tokens for heads", "all_to_all", 10**9, 2, ranks=4)
    assert swap.sent(64) == pytest.approx(0.75e9)
    assert swap.seconds(FABRIC, 64) == pytest.approx(2 * 3e-6 + 0.75 / 200)
    wide = Collective("matrices of muon", "all_to_all", 10**9, 1)
    assert wide.seconds(FABRIC, 16) == pytest.approx(7e-6 + 1e-5 + 15 / 16 / 12.5)


def test_time_inside_a_node_is_latency_and_bandwidth_of_a_ring():
    all_reduce = Collective("gradients", "all_reduce", 8 * 10**9, 1)
    assert all_reduce.seconds(FABRIC, 8) == pytest.approx(2 * 7e-6 + 2 * 7 / 8 * 8 / 200)
    assert Collective("weights", "all_gather", 8 * 10**9, 10).seconds(FABRIC, 8) == pytest.approx(10 * 7e-6 + 7 / 200)


def test_time_between_nodes_has_the_nodes_network():
    """Four nodes: the slower link, a ring of 28 hops inside of them and three between; an all-reduce goes up and down a
    tree of two levels."""
    gather = Collective("weights", "all_gather", 8 * 10**9, 1)
    assert gather.seconds(FABRIC, 32) == pytest.approx(28e-6 + 3 * 3e-6 + 31 / 32 * 8 / 100)
    reduce = Collective("gradients", "all_reduce", 8 * 10**9, 1)
    assert reduce.seconds(FABRIC, 32) == pytest.approx(2 * 7e-6 + 4e-5 + 2 * 31 / 32 * 8 / 100)


def test_latency_of_gathers_is_a_rings_but_with_one_gpu_in_a_node_a_logarithm():
    """As in NCCL's cost model: 64 nodes of 8 in its low-latency protocol 448 hops of 1 us, 63 of 2.7 us, and 6.6 us
    to begin with."""
    small = Collective("small weights", "all_gather", 664 * 4096, 664)
    nodes_of_8 = Fabric.of(CATALOG["h100"])
    assert small.latency_s(nodes_of_8, 512) / 664 == pytest.approx(448e-6 + 63 * 2.7e-6 + 6.6e-6, rel=0.05)
    single = Fabric.of(CATALOG["h100"], gpus_per_node=1)
    assert small.latency_s(single, 512) / 664 == pytest.approx(9 * 10e-6)
    reduce = Collective("gradients", "reduce", 4096, 1)
    assert reduce.latency_s(single, 512) == pytest.approx(511 * 3e-6), "PAT has no reduce"
    assert small.latency_s(single, 2) == pytest.approx(664 * 3e-6), "the ring where it is the faster one"


def test_an_unknown_gpu_is_named_with_the_nearest():
    assert find_gpu("H100") is CATALOG["h100"]
    with pytest.raises(ConfigError, match=r"--gpu h1000: expected one of a100-40, .*; did you mean h100\?"):
        find_gpu("h1000")


def test_the_users_overlay_counts():
    overlay = {"stage3_max_reuse_distance": 7, "stage3_prefetch_bucket_size": 5}
    buckets = {"reduce_bucket_size": 9, "overlap_comm": False, "use_multi_rank_bucket_allreduce": True}
    zero = Zero.of(EngineConfig(zero_stage=3, deepspeed={"zero_optimization": overlay | buckets}), 8)
    assert (zero.reuse, zero.prefetch) == (7, 5)
    assert (zero.bucket, zero.overlap, zero.whole_bucket_all_reduce) == (9, False, True)
