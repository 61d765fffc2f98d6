"""The DeepSpeed JSON is a pure function of the typed config, and an overlay cannot contradict it."""

import pytest

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.engine.deepspeed_config import bucket_elements, deepspeed_config


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


def test_overlay_conflict_names_key_and_both_values():
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.zero_optimization\.stage is 3, but .* says 1"):
        derive(zero_stage=1, deepspeed={"zero_optimization": {"stage": 3}})


@pytest.mark.parametrize(
    ("section", "key"), [("optimizer", "optimizer"), ("scheduler", "schedule"), ("bf16", "precision")]
)
def test_overlay_cannot_bring_what_a_typed_key_says(section, key):
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed\.{section} is not for this run: engine\.{key} says"):
        derive(precision="fp32", deepspeed={section: {"enabled": True}})


def test_overlay_tunes_the_loss_scale_of_the_run_s_own_precision():
    assert derive(precision="fp16", deepspeed={"fp16": {"hysteresis": 4}})["fp16"]["hysteresis"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_with_low_precision_is_refused(precision):
    with pytest.raises(ValueError, match="zero_stage 0 with precision"):
        EngineConfig(zero_stage=0, precision=precision)
