"""A plan of a real config: parameters from the meta device, everything labelled as a prediction."""

import json

import pytest

from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord.fusion.model import build_model
from trichord.planning.plan import count_parameters, plan, render_plan

IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}


@pytest.fixture(scope="module")
def config():
    return load_run_config("debug/tiny", ["engine.zero_stage=2", "batches.tokenizer=nowhere/tokenizer"])


@pytest.fixture(scope="module")
def facts(config):
    return plan(config, gpus=8, vocab_size=100)


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
    frozen = load_run_config("debug/tiny", ["encoders.vision.freeze=true"])
    count = count_parameters(frozen, 100, IDS)["vision"]
    assert count["trainable"] == 0
    assert count["frozen"] > 0


def test_the_plan_is_data_and_says_it_is_a_prediction(facts):
    assert json.loads(json.dumps(facts))["prediction"] is True
    assert list(facts["states"]) == [0, 1, 2, 3]
    assert facts["rows"]["accumulation"] == 1
    assert facts["rows"]["idle_ranks"] == 4
    text = render_plan(facts)
    for part in (
        "PREDICTION for 'tiny' on 8 GPUs",
        "ZeRO-2",
        "<- chosen",
        "idle GPUs         4",
        "75.0 % of what is computed",
        "vocabulary of 100 as given",
        "not predicted yet: activations, time of a step",
    ):
        assert part in text, part
    (chosen,) = [line for line in text.splitlines() if "<- chosen" in line]
    assert "ZeRO-2" in chosen


def test_stages_that_the_config_refuses_are_left_out():
    bf16 = load_run_config("debug/tiny", ["engine.zero_stage=1", "engine.precision=bf16"])
    assert list(plan(bf16, 2, vocab_size=100)["states"]) == [1, 2, 3]
    offload = load_run_config("debug/tiny", ["engine.zero_stage=3", "engine.offload=all"])
    assert list(plan(offload, 2, vocab_size=100)["states"]) == [3]


def test_without_its_tokenizer_the_vocabulary_is_assumed_and_said(config):
    facts = plan(config, 1)
    assert facts["vocab_size"] == 151_936
    assert "tokenizer nowhere/tokenizer is not here: a vocabulary of 151,936 is assumed" in render_plan(facts)


def test_no_gpus_is_a_mistake(config):
    with pytest.raises(ConfigError, match="at least 1 GPU, got 0"):
        plan(config, 0)
