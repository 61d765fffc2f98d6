"""How fast what learns: groups by room, layer and kind of parameter, and the schedules they follow."""

import pytest
import torch
from torch import nn

from trichord.core.errors import ConfigError
from trichord.core.schedule import lr_multiplier
from trichord.engine.config import EngineConfig
from trichord.engine.param_groups import build_param_groups, fused_matrices, rate_of


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = Tower()
        self.trunk = nn.Linear(4, 4)


def room_of(name):
    return name.split(".")[0]


def config_of(**engine):
    return EngineConfig.model_validate({"lr": 1.0, **engine})


def groups_of(**engine):
    model = Model()
    groups = build_param_groups(model, config_of(**engine), room_of)
    names = {id(p): name for name, p in model.named_parameters()}
    return groups, {names[id(p)]: group for group in groups for p in group["params"]}


def test_without_rates_per_room_there_are_two_groups():
    groups, of = groups_of(weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    assert len(of) == len(list(Model().parameters()))
    assert of["vision.norm.weight"]["name"] == of["trunk.bias"]["name"] == "no_decay"


def test_rates_of_a_room_and_of_its_layers():
    _, of = groups_of(rooms={"vision": {"lr_ratio": 0.1, "layer_decay": 0.5, "weight_decay": 0.3}})
    ratios = {name: group["lr_ratio"] for name, group in of.items() if name.endswith("weight")}
    assert ratios == pytest.approx(
        {
            "vision.patch_embed.weight": 0.1 * 0.5**3,
            "vision.blocks.0.weight": 0.1 * 0.5**2,
            "vision.blocks.1.weight": 0.1 * 0.5,
            "vision.norm.weight": 0.1,  # behind the last layer
            "trunk.weight": 1.0,
        }
    )
    assert of["vision.blocks.0.weight"]["weight_decay"] == 0.3
    assert of["vision.blocks.0.bias"]["weight_decay"] == 0.0
    assert of["trunk.weight"]["weight_decay"] == 0.1
    assert of["vision.blocks.0.weight"]["lr"] == pytest.approx(0.025)


def test_a_room_that_starts_late_stands_still_and_then_warms_up():
    config = config_of(schedule="constant", warmup_steps=4, rooms={"vision": {"start_step": 10}})
    _, of = groups_of(schedule="constant", warmup_steps=4, rooms={"vision": {"start_step": 10}})
    late = [rate_of(of["vision.blocks.0.weight"], config, step, 100) for step in (0, 9, 10, 11, 13, 14)]
    assert late == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert [rate_of(of["trunk.weight"], config, step, 100) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]


def test_a_room_with_a_schedule_of_its_own():
    config = config_of(schedule="linear", rooms={"trunk": {"schedule": "constant"}})
    _, of = groups_of(schedule="linear", rooms={"trunk": {"schedule": "constant"}})
    assert rate_of(of["trunk.weight"], config, 50, 100) == 1.0
    assert rate_of(of["vision.norm.bias"], config, 50, 100) == 0.5


def test_a_room_that_is_not_there_or_frozen_is_named():
    with pytest.raises(ConfigError, match=r"engine\.rooms\.audio: .* trunk, vision"):
        groups_of(rooms={"audio": {}})
    model = Model()
    model.vision.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"engine\.rooms\.vision"):
        build_param_groups(model, config_of(rooms={"vision": {}}), room_of)


def test_a_frozen_model_has_nothing_to_learn():
    with pytest.raises(ValueError, match="frozen"):
        build_param_groups(nn.Linear(2, 2).requires_grad_(False), EngineConfig(), room_of)


def test_tied_weights_are_in_one_group_once():
    model = Model()
    model.trunk.weight = model.vision.blocks[0].weight
    groups = build_param_groups(model, EngineConfig(), room_of)
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (9, 1.0), (79, 1.0), (80, 1.0), (85, 0.5), (99, 0.0253), (100, 0.0), (200, 0.0)]
)
def test_warmup_stable_decay(step, expected):
    found = lr_multiplier("wsd", step, warmup_steps=10, total_steps=100)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_fall_of_wsd_has_a_length_and_a_floor():
    def at(step, **options):
        return lr_multiplier("wsd", step, warmup_steps=0, total_steps=100, **options)

    assert (at(89, decay_steps=10), at(90, decay_steps=10)) == (1.0, 1.0)
    assert at(100, decay_steps=10, min_ratio=0.1) == pytest.approx(0.1)
    assert at(50, decay_steps=1000) < 1.0  # longer than the run: it falls from the start


def test_linear_and_cosine_are_as_they_were():
    def at(name, step):
        return lr_multiplier(name, step, warmup_steps=10, total_steps=110, min_ratio=0.1)

    assert at("linear", 60) == pytest.approx(0.55)
    assert at("cosine", 60) == pytest.approx(0.55)
    assert at("cosine", 35) == pytest.approx(0.1 + 0.9 * 0.8536, abs=1e-4)
    assert at("constant", 1000) == 1.0


@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("vision.backbone.blocks.3.attn.qkv.weight", (48, 16), 3),
        ("vision.backbone.blocks.3.attn.in_proj_weight", (48, 16), 3),
        ("trunk.model.layers.0.self_attn.q_proj.weight", (16, 16), 1),
        ("connectors.image.fc1.weight", (16, 16), 1),
        ("trunk.model.embed_tokens.weight", (32, 16), 0),
        ("trunk.lm_head.weight", (32, 16), 0),
        ("heads.image.proj.weight", (8, 16), 0),
        ("vision.backbone.layers.0.attn.relative_position_bias_table", (49, 2), 0),
        ("vision.backbone.patch_embed.proj.weight", (16, 3, 8, 8), 0),
        ("vision.backbone.stages.0.blocks.0.conv_dw.weight", (16, 1, 7, 7), 0),
        ("vision.backbone.blocks.3.norm1.weight", (16,), 0),
    ],
)
def test_which_parameters_are_matrices_of_hidden_layers(name, shape, matrices):
    assert fused_matrices(name, nn.Parameter(torch.zeros(shape))) == matrices


def test_muon_has_groups_of_its_own_and_their_rate():
    rooms = {"vision": {"lr_ratio": 0.1}}
    config = config_of(optimizer="muon", muon={"lr": 5.0}, rooms=rooms, schedule="constant", warmup_steps=2)
    groups = build_param_groups(model := Model(), config, room_of)
    names = {id(p): name for name, p in model.named_parameters()}
    of = {names[id(p)]: group for group in groups for p in group["params"]}
    muon = {name for name, group in of.items() if group["muon"]}
    assert muon == {"vision.blocks.0.weight", "vision.blocks.1.weight"}
    assert of["vision.blocks.0.weight"]["weight_decay"] == config.weight_decay
    rates = {name: rate_of(group, config, 0, 10) for name, group in of.items()}
    assert rates["vision.blocks.0.weight"] == pytest.approx(0.5 * 5.0 * 0.1)  # half-way through the warm-up
    assert rates["vision.blocks.0.bias"] == pytest.approx(0.5 * 1.0 * 0.1)
    assert rates["trunk.weight"] == pytest.approx(0.5)


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ConfigError, match="no matrix of a hidden layer learns"):
        build_param_groups(nn.Linear(3, 3), config_of(optimizer="muon"), room_of)
