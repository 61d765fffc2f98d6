"""A plan of a real config: shapes from the meta device, everything labelled as a prediction, the best layout usable."""

import json
from dataclasses import replace
from functools import reduce
from types import SimpleNamespace

import pytest

from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.fusion.model import build_model
from trichord.planning.advice import advice
from trichord.planning.amounts import amount_text, count_text, duration_text, seconds_text, size_text, table
from trichord.planning.gpus import CATALOG, Fabric
from trichord.planning.layout import Layout, states_of
from trichord.planning.plan import Question, plan
from trichord.planning.render import render_plan
from trichord.planning.roofline import collectives_of
from trichord.planning.saving import check_place, save_plan
from trichord.planning.search import Machine, best_layout, judge, largest_useful, layouts
from trichord.planning.shortfall import shortfall
from trichord.planning.subject import Subject
from trichord.planning.workload import find_workload
from trichord.planning.zero import Zero

IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
TOKENIZER = "batches.tokenizer=nowhere/tokenizer"


def config_of(*overrides):
    return load_run_config("debug/tiny", [TOKENIZER, "engine.zero_stage=2", *overrides])


@pytest.fixture(scope="module")
def config():
    return config_of()


@pytest.fixture(scope="module")
def facts(config):
    return plan(config, Question(gpus=8, vocab_size=100, price=2.5))


@pytest.fixture(scope="module")
def subject():
    config = load_run_config("debug/tiny", [TOKENIZER, "engine.precision=bf16", "engine.zero_stage=1"])
    config = config.model_copy(update={"batches": config.batches.model_copy(update={"rows_per_step": 64})})
    return Subject(config, find_workload(config, None), 50_000)


def test_the_parameters_are_those_of_the_built_model(config, facts):
    model = build_model(
        config.encoders, config.fusion, config.objectives, config.samples, config.layers, vocab_size=100, special=IDS
    )
    assert facts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts["frozen"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert set(facts["parameters"]) == {"vision", "audio", "text", "connector", "trunk", "heads"}
    trunk = sum(p.numel() for p in model.trunk.parameters())
    assert sum(facts["parameters"]["trunk"].values()) == trunk, "tied weights count once"


def test_frozen_rooms_are_told_apart():
    frozen = Subject(config_of("encoders.vision.freeze=true"), find_workload(config_of(), None), 100)
    count = frozen.count_parameters()["vision"]
    assert count["trainable"] == 0
    assert count["frozen"] > 0


def test_the_plan_is_data_and_says_it_is_a_prediction(facts):
    assert json.loads(json.dumps(facts))["prediction"] is True
    assert facts["format"] == 1
    assert list(facts["states"]) == [0, 1, 2, 3]
    assert facts["rows"]["accumulation"] == 1
    assert facts["rows"]["idle_ranks"] == 4
    assert {"bytes", "per_rank_bytes", "kept_bytes"} <= set(facts["checkpoint"])
    assert facts["memory"]["device_bytes"] > facts["activations"]["bytes"] > 0
    assert facts["memory"]["host_bytes"] > 0
    assert facts["cost"]["cost"] == pytest.approx(2.5 * facts["cost"]["gpu_hours"])
    assert facts["cost"]["days"] == pytest.approx(10 * facts["time"]["step_s"] / 86_400)
    assert [outcome["gpus"] for outcome in facts["scaling"]] == [2**power for power in range(13)]


def test_a_person_can_read_it(facts):
    text = render_plan(facts)
    for part in (
        "PREDICTION for 'tiny' on 8 x NVIDIA H100",
        "ZeRO-2",
        "sum in backward",
        "idle GPUs         4",
        "75.0 % of what is computed",
        "vocabulary of 100 as given",
        "of a typical micro-batch: vision",
        "communication per step",
        "best layout that fits",
        "  4096 ",
        "past 4 GPUs the run has too few rows per step (batches.rows_per_step=4)",
        "GPU hours",
        "data sheet",
        "not predicted: the loader",
    ):
        assert part in text, part
    (stages,) = [line for line in text.splitlines() if "ZeRO-0" in line]
    assert stages.split() == ["ZeRO-0", "ZeRO-1", "ZeRO-2*", "ZeRO-3"]
    (marked,) = [line for line in text.splitlines() if line.lstrip().startswith("*")]
    assert int(marked.split()[0][1:]) == facts["largest_useful_gpus"]
    assert max(map(len, render_plan(facts, 80).splitlines())) <= 80


def test_columns_without_anything_are_left_out_and_amounts_keep_their_units_apart():
    rows = [["GPUs", "step", "cost"], ["1", seconds_text(2.81e-6), ""], ["16", seconds_text(0.455), ""]]
    assert table(rows, None) == ["  GPUs     step", "     1  2.81 us", "    16   455 ms"]
    assert [seconds_text(s) for s in (1.999, 1234.0, 0.0)] == ["2.00 s", "1,234 s", "0"]
    assert [duration_text(s) for s in (0.08, 90, 7200, 172_800)] == ["80.0 ms", "1.5 min", "2.0 h", "2.0 days"]
    assert [amount_text(n) for n in (0.001, 1.234, 1234.5)] == ["under 0.01", "1.2", "1,234"]
    assert [count_text(n, "GPU") for n in (1, 2048)] == ["1 GPU", "2,048 GPUs"]
    assert [size_text(n) for n in (72, 2048, 2**30)] == ["72 B", "2.0 KiB", "1.00 GiB"]


@pytest.fixture(scope="module")
def on_a_small_node(config):
    return plan(config, Question(1, vocab_size=100, host_gib=2))


def test_the_limit_that_was_hit_is_named(on_a_small_node):
    """Three GiB for a rank's process, two in the node; the GPU is large enough."""
    facts = on_a_small_node
    assert (facts["memory"]["exceeds"], facts["best"], set(facts["scaling_limits"])) == (["host"], None, {"host"})
    assert facts["none_fits"]["limit"] == "host"
    assert 3 * 2**30 < facts["none_fits"]["least_bytes"] <= facts["memory"]["host_bytes"]
    text = render_plan(facts)
    for part in (
        "of 79.6 GiB: fits",
        f"memory of a node: {size_text(facts['memory']['host_bytes'])} of 2.00 GiB (--host-gib): DOES NOT FIT; lower "
        "batches.prefetch_steps (now 2), or take nodes with more memory",
        f"needs {size_text(facts['none_fits']['least_bytes'])} of host memory in a node, which has 2.00 GiB",
        "on 1 to 4,096 GPUs: no layout fits the memory of a node (--host-gib)",
    ):
        assert part in text, part
    assert "larger GPUs" not in text


def test_an_overlay_of_an_earlier_plan_does_not_outlive_it(facts, on_a_small_node, tmp_path):
    overlay = save_plan(tmp_path / "plan.json", facts)[1]
    assert save_plan(tmp_path / "plan.json", on_a_small_node) == [tmp_path / "plan.json"]
    assert not overlay.exists()


def test_what_the_most_modest_layout_needs_is_told(subject):
    found = shortfall(subject, 4, machine_of(1))
    assert found.limit == "gpu"
    assert best_layout(subject, 4, machine_of((found.least_bytes - 2**20) / 2**30)) is None
    assert best_layout(subject, 4, machine_of((found.least_bytes + 2**20) / 2**30)) is not None
    in_pairs = Subject(config_of("engine.hpz_ranks=2", "engine.zero_stage=3"), subject.workload, 100)
    assert shortfall(in_pairs, 1, machine_of(80)).limit == "config"


def test_the_largest_useful_size_is_where_doubling_stops_to_pay():
    def outcomes(*seconds):
        return [s and SimpleNamespace(ranks=2**i, time=SimpleNamespace(total=s)) for i, s in enumerate(seconds)]

    assert largest_useful(outcomes(None, 8.0, 4.1, 2.2, 1.9, 0.5)) == 8
    assert largest_useful(outcomes(8.0, 6.0, 4.5)) == 4
    assert largest_useful(outcomes(None, None)) is None


def test_small_gathers_that_cost_much_are_spoken_of(subject):
    """Four nodes: norms and biases are gathered one by one at stage 3."""
    outcome = judge(subject, Layout(3, 1, "none", "none"), 32, machine_of(80))
    (persistence, *_) = found = advice(subject, outcome, machine_of(80))
    assert persistence["set"] == "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    assert all(0 < advised["step_s"] < outcome.time.total for advised in found)
    assert all(advised["latency_s"] > 0.05 * outcome.time.total for advised in found)
    overlay = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = EngineConfig(zero_stage=3, precision="bf16", deepspeed=overlay)
    assert Zero.of(engine, 32).persistence == 0, "the key is one that counts"
    for stage, ranks in ((1, 32), (3, 8)):  # no such messages; under 5 % of the step
        assert (
            advice(subject, judge(subject, Layout(stage, 1, "none", "none"), ranks, machine_of(80)), machine_of(80))
            == []
        )


def test_the_config_keys_that_count_are_kept(config, facts):
    keys, data = facts["config"], config.model_dump(mode="json")
    assert keys["fusion.trunk.hidden_size"] == config.fusion.trunk.hidden_size
    assert {"batches.rows_per_step", "engine.zero_stage", "engine.deepspeed", "samples.image.size"} <= set(keys)
    assert not {"engine.lr", "batches.packing", "samples.image.mean", "run.name"} & set(keys)
    for path, value in keys.items():
        assert reduce(lambda part, name: part[name], path.split("."), data) == value


def test_every_assumed_number_is_printed(facts):
    """A change of an assumption that the plan does not tell would be a silent one."""
    text = " ".join(facts["assumptions"])
    for part in (
        "65 %",
        "35 %",
        "75 %",
        "989" if facts["precision"] != "fp32" else "67",
        "8 %",
        "1.5 GiB",
        "4 us",
        "3 us",
    ):
        assert part in text, part


def test_stages_that_the_config_refuses_are_left_out():
    assert list(plan(config_of("engine.precision=bf16"), Question(2, vocab_size=100))["states"]) == [1, 2, 3]
    offload = config_of("engine.zero_stage=3", "engine.offload=all")
    assert list(plan(offload, Question(2, vocab_size=100))["states"]) == [3]


def test_without_its_tokenizer_the_vocabulary_is_assumed_and_said(config):
    found = Subject(config, find_workload(config, None))
    assert found.vocab_size == 151_936
    assert found.vocab_note == "tokenizer nowhere/tokenizer is not here: a vocabulary of 151,936 is assumed"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(0), "at least 1 GPU, got 0"),
        (Question(1, price=-1.0), "--price: expected the price of a GPU hour, above 0"),
        (Question(1, price=float("inf")), "--price: expected the price of a GPU hour, above 0, got inf"),
        (Question(1, host_gib=float("inf")), "--host-gib: expected a finite number above 0, got inf"),
        (Question(1, node_gb_per_s=float("nan")), "--network: expected a finite number above 0, got nan"),
        (Question(10**12), "at most 1,000,000 GPUs, got 1000000000000"),
        (Question(1, gpu="t4"), "--gpu t4: expected one of a100-40"),
    ],
)
def test_a_mistake_is_told_before_anything_is_built(config, question, message):
    with pytest.raises(ConfigError, match=message):
        plan(config, question)


def machine_of(gib: float) -> Machine:
    gpu = replace(CATALOG["h100"], memory_gib=gib)
    return Machine(gpu, Fabric.of(gpu))


def test_what_fits_needs_less_than_there_is_and_the_fastest_of_it_is_chosen(subject):
    roomy = best_layout(subject, 4, machine_of(80))
    assert roomy is not None
    limit = (roomy.memory.device_bytes - 2**20) / 2**30
    tight = best_layout(subject, 4, machine_of(limit))
    assert tight is not None
    assert tight.memory.device_bytes <= limit * 2**30
    assert roomy.time.total <= tight.time.total
    assert best_layout(subject, 4, machine_of(1)) is None


def test_offloading_is_chosen_only_where_nothing_else_fits(subject):
    assert best_layout(subject, 4, machine_of(80)).layout.offload == "none"
    slow = judge(subject, Layout(1, 1, "optimizer", "none"), 4, machine_of(80))
    fast = judge(subject, Layout(1, 1, "none", "none"), 4, machine_of(80))
    assert slow.time.total > fast.time.total
    assert slow.memory.device_bytes < fast.memory.device_bytes
    assert slow.memory.host_bytes > fast.memory.host_bytes


def test_recomputation_trades_memory_for_time(subject):
    kinds = [judge(subject, Layout(1, 4, "none", mode), 4, machine_of(80)) for mode in ("none", "selective", "full")]
    activations = [kind.memory.activations for kind in kinds]
    assert activations == sorted(activations, reverse=True)
    assert len(set(activations)) == 3
    assert [kind.time.total for kind in kinds] == sorted(kind.time.total for kind in kinds)


def test_the_overlay_is_the_best_layout_and_loads(facts, tmp_path):
    written = save_plan(tmp_path / "plan.json", facts)
    assert [path.name for path in written] == ["plan.json", "plan.overlay.yaml"]
    assert json.loads(written[0].read_text())["best"]["zero_stage"] == facts["best"]["zero_stage"]
    assert "PREDICTION" in written[1].read_text()
    config = load_run_config("debug/tiny", [TOKENIZER, str(written[1])])
    best = facts["best"]
    assert (config.engine.zero_stage, config.batches.micro_rows) == (best["zero_stage"], best["micro_rows"])
    assert (config.engine.offload, config.engine.activation_checkpointing) == (
        best["offload"],
        best["activation_checkpointing"],
    )
    with pytest.raises(ConfigError, match=r"expected a name that ends in .json"):
        save_plan(tmp_path / "plan.txt", facts)


def test_where_it_is_written_is_looked_at_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "plan.json").mkdir()
    check_place(tmp_path / "new" / "deeper" / "plan.json")
    with pytest.raises(ConfigError, match=r"cannot be written: .*/file is no folder"):
        check_place(tmp_path / "file" / "plan.json")
    with pytest.raises(ConfigError, match=r"cannot be written: .*/plan.json is a folder"):
        check_place(tmp_path / "plan.json")
    assert not (tmp_path / "new").exists()


def test_rows_are_shared_only_where_nothing_fits_without(subject):
    """On 4 GPUs that are a little too small for any layout without."""
    least = min(judge(subject, layout, 4, machine_of(80)).memory.device_bytes for layout in layouts(subject, 4))
    tight = machine_of((least - 2**10) / 2**30)
    assert all(not judge(subject, layout, 4, tight).fits for layout in layouts(subject, 4))
    found = best_layout(subject, 4, tight)
    assert found is not None
    assert found.layout.sharing == 2
    assert found.accumulation == -(-64 // (2 * found.layout.micro_rows)), "two groups of two"
    assert found.layout.overlay()["engine"]["sequence_parallel"] == 2
    one_by_one = replace(tight, fabric=replace(tight.fabric, gpus_per_node=1))
    assert best_layout(subject, 4, one_by_one) is None, "groups stay inside a node"


def test_ranks_that_share_rows_have_a_part_of_each_and_exchange_it(subject):
    alone, shared = (judge(subject, Layout(1, 4, "none", "none", size), 4, machine_of(80)) for size in (1, 2))
    assert shared.accumulation == 2 * alone.accumulation
    assert shared.states == alone.states, "states are divided over all ranks"
    assert 0.4 < shared.memory.activations / alone.memory.activations < 0.7
    assert shared.memory.loss < alone.memory.loss
    sent = {}
    for size, accumulation in ((1, 4), (2, 8)):
        layout = Layout(1, 4, "none", "full", size)
        found = collectives_of(subject, layout, states_of(subject, layout, 4)[0])
        sent[size] = {c.what: c for c in found}
        assert sent[size]["features"].bytes % (4 * 8 * 4 * accumulation) == 0, "slots of a rank do not shrink"
    exchange = sent[2]["tokens for heads"]
    per_token = 4 * 32 * 2  # q, k, v and the result, 2 heads of 16, bf16
    assert exchange.bytes == 8 * 3 * (4 * 256 // 2) * per_token, "forwards, backwards, and in the recomputation"
    assert (exchange.messages, exchange.ranks) == (8 * 3 * 2, 2)
    assert set(sent[2]) - set(sent[1]) == {"tokens for heads", "features of items"}


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (3, ("engine.sequence_parallel=2",), "does not divide the 3 ranks"),
        (4, ("engine.sequence_parallel=4",), "cannot share the 2 attention heads"),
        (2, ("engine.hpz_ranks=4", "engine.zero_stage=3"), "hpz_ranks is 4, which does not divide 2 GPUs"),
    ],
)
def test_groups_that_do_not_fit_are_refused(gpus, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan(config_of(*overrides), Question(gpus, vocab_size=100))


def test_progress_begins_at_once_and_ends(config):
    seen = []
    plan(config, Question(2, vocab_size=100), lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(len(seen)))
    assert seen[-1][0] == seen[-1][1]


def test_mfu_cannot_pass_what_was_assumed_of_products(subject):
    """A plan that promises more than its own roofline would be wrong whatever the machine."""
    for rows in (1, 4, 16):
        outcome = judge(subject, Layout(1, rows, "none", "none"), 4, machine_of(80))
        assert 0 < outcome.mfu_frac < CATALOG["h100"].products
