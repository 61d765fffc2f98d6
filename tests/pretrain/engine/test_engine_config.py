"""The DeepSpeed JSON is a pure function of the typed config, and an overlay cannot contradict what is typed."""

import re
from pathlib import Path

import pytest

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.engine.deepspeed_config import bucket_elements, deepspeed_config
from trichord.engine.overlay import REFUSED, TAKEN

PINNED = {"pin_memory": True}
ZERO = "zero_optimization"


def derive(**engine):
    return deepspeed_config(EngineConfig(**engine), micro_rows=2, grad_accum_steps=3)


def test_stage_2_bf16_snapshot():
    assert derive(zero_stage=2, precision="bf16", max_grad_norm=0.5) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 500_000_000,
            "allgather_bucket_size": 500_000_000,
            "use_multi_rank_bucket_allreduce": False,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2147483647,
        "bf16": {"enabled": True},
    }


def test_stage_3_snapshot_of_what_goes_over_the_wire():
    engine = EngineConfig(zero_stage=3, hpz_ranks=8, offload="optimizer", nvme_path="/nvme")
    config = deepspeed_config(engine, micro_rows=2, grad_accum_steps=3, num_parameters=9_000_000_000)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "use_multi_rank_bucket_allreduce": False,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": False,
        "zero_hpz_partition_size": 8,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "pin_memory": False},
    }


@pytest.mark.parametrize(
    ("num_parameters", "expected"),
    [(1, 2**24), (2**28, 2**24), (2**29 + 5, 2**25), (7_000_000_000, 2**28), (70_000_000_000, 500_000_000)],
)
def test_messages_grow_with_the_model(num_parameters, expected):
    assert bucket_elements(num_parameters) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"zero_stage": 2, "hpz_ranks": 2}, "needs zero_stage 3, got 2"),
        ({"zero_stage": 3, "nvme_path": "/nvme"}, "got offload 'none' at stage 3"),
        ({"zero_stage": 1, "offload": "optimizer", "nvme_path": "/nvme"}, "at stage 1"),
        (
            {"zero_stage": 3, "activation_checkpointing": "selective", "checkpoint_every_blocks": 2},
            "got checkpoint_every_blocks 2",
        ),
        ({"betas": (1.0, 0.95)}, "betas.0"),
        ({"betas": (0.9, -0.1)}, "betas.1"),
        ({"timeout_s": 1e20}, "less than or equal to 2592000"),
        ({"zero_stage": 3, "offload": "all", "nvme_path": " "}, "at least 1 character"),
    ],
)
def test_what_is_wrong_or_does_not_go_together_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**wrong)


def test_switches_of_older_runs_are_read():
    assert EngineConfig.model_validate({"activation_checkpointing": True}).activation_checkpointing == "full"
    assert EngineConfig.model_validate({"activation_checkpointing": False}).activation_checkpointing == "none"


def test_stage_0_leaves_clipping_to_us():
    config = derive(zero_stage=0, precision="fp32")
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"] == {"stage": 0}


def test_offload_of_everything_reaches_both_parts():
    zero = derive(zero_stage=3, offload="all")["zero_optimization"]
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"


def test_overlay_adds_keys_at_any_depth():
    config = derive(deepspeed={"comms_logger": {"enabled": True}, "zero_optimization": {"sub_group_size": 7}})
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"]["sub_group_size"] == 7
    assert config["zero_optimization"]["stage"] == 1


def test_overlay_wins_over_what_is_only_a_default():
    chosen = {
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 7,
        "overlap_comm": False,
        "contiguous_gradients": False,
    }
    config = derive(zero_stage=2, deepspeed={"zero_optimization": chosen, "steps_per_print": 5})
    assert config["zero_optimization"].items() >= chosen.items()
    assert config["steps_per_print"] == 5
    pinned = derive(zero_stage=2, offload="optimizer", deepspeed={"zero_optimization": {"offload_optimizer": PINNED}})
    assert pinned["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({ZERO: {"stage": 3}}, "zero_optimization.stage is 3, but engine.zero_stage says 1; set engine.zero_stage"),
        ({ZERO: {"zero_hpz_partition_size": 8}}, "is 8, but engine.hpz_ranks leaves it at DeepSpeed's default"),
        ({ZERO: {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.device is 'cpu', but engine.offload"),
        ({ZERO: {"zenflow": {"topk_ratio": 0.1}}}, "zenflow is not for this run: it is another update"),
        ({ZERO: 3}, "zero_optimization: expected a mapping of keys to values, got 3"),
        ({"steps_per_print": 0}, "steps_per_print: expected a whole number from 1 on, got 0"),
        ({"flops_profiler": {"profile_step": "abc"}}, "profile_step: expected a whole number from 1 on, got 'abc'"),
        ({"zero_optimizaton": {}}, "zero_optimizaton: DeepSpeed knows no such key; nearest: zero_optimization"),
        ({"xyz": 1}, "xyz: DeepSpeed knows no such key; taken: zero_optimization, fp16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not for this run: engine.optimizer says"),
        ({"scheduler": {}}, "scheduler is not for this run: engine.schedule says"),
        ({"fp16": {"enabled": True}}, "fp16 is not for this run: engine.precision says"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but engine.precision says True"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "masters are fp32; .* engine.optimizer_states"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "engine.precision=autocast_bf16 sums in fp32"),
        ({"train_batch_size": 77}, "train_batch_size is not for this run: set batches.rows_per_step"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is not for this run: set engine.max_grad_norm"),
        ({"prescale_gradients": True}, "prescale_gradients is not for this run: losses are normalised"),
        ({"compression_training": {}}, "compression_training is not for this run: DeepSpeed has removed it"),
    ],
)
def test_overlay_that_contradicts_or_has_no_meaning_here_is_refused(overlay, message):
    with pytest.raises(ConfigError, match=rf"^engine\.deepspeed\.(?:.*){message}"):
        derive(zero_stage=1, deepspeed=overlay)


def test_overlay_tunes_the_loss_scale_of_the_run_s_own_precision():
    assert derive(precision="fp16", deepspeed={"fp16": {"hysteresis": 4}})["fp16"]["hysteresis"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_with_low_precision_is_refused(precision):
    with pytest.raises(ValueError, match="zero_stage 0 with precision"):
        EngineConfig(zero_stage=0, precision=precision)


def test_the_guide_s_table_has_every_name():
    guide = (Path(__file__).parents[3] / "docs/guides/training.md").read_text()
    table = guide[guide.index("| In `engine.deepspeed` |") :].split("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines())
    assert set(re.findall(r"`(\w+)`", first_cells)) == {*TAKEN, *REFUSED}
