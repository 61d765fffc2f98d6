"""Keys without effect and schedules that the run cuts off are told, and only those."""

import re

import pytest

from trichord.engine.config import EngineConfig
from trichord.engine.doubts import doubts

WSD = {"schedule": "wsd", "decay_steps": 40}


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"decay_steps": 5}, "engine.decay_steps has no effect with engine.schedule cosine"),
        ({"muon": {"lr": 0.02}}, "engine.muon has no effect with engine.optimizer adamw"),
        ({"momentum": 0.8, "optimizer": "muon"}, "engine.momentum has no effect .*; set engine.muon.momentum"),
        ({"betas": (0.9, 0.99), "optimizer": "sgd"}, "engine.betas has no effect"),
        ({"checkpoint_every_blocks": 2}, "engine.checkpoint_every_blocks has no effect"),
        ({"offload_optimizer": "torch"}, "engine.offload_optimizer has no effect with engine.offload none"),
        ({"warmup_steps": 100}, "engine.warmup_steps 100 is no shorter than the run of 100 steps"),
        ({**WSD, "warmup_steps": 61}, "engine.decay_steps 40 is longer than what the run of 100 steps has"),
        ({"rooms": {"vision": {"start_step": 100}}}, "engine.rooms.vision.start_step 100 lies behind the run"),
    ],
)
def test_each_is_told_once(engine, words):
    (told,) = doubts(EngineConfig.model_validate(engine), 100)
    assert re.search(words, told)


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {**WSD, "warmup_steps": 60},
        {"rooms": {"vision": {"schedule": "wsd", "start_step": 99}}, "decay_steps": 5, "warmup_steps": 99},
        {"optimizer": "muon", "muon": {"lr": 0.02}},
        {"optimizer": "sgd", "momentum": 0.5},
        {"activation_checkpointing": "full", "checkpoint_every_blocks": 2},
        {"zero_stage": 2, "offload": "optimizer", "offload_optimizer": "torch"},
    ],
)
def test_what_has_an_effect_is_not(engine):
    assert doubts(EngineConfig.model_validate(engine), 100) == []


def test_a_length_that_is_not_yet_counted_cuts_nothing_off():
    assert doubts(EngineConfig(warmup_steps=10**9), None) == []
