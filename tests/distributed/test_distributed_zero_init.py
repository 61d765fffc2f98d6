"""Stage 3 from the first moment: a model that is built in slices is the model that is built whole, bit for bit, and no
rank ever holds it whole."""

import copy
import weakref

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trichord.encoders.weights import StoredWeights
from trichord.engine.build import build_engine, start_process_group
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.partition import building_in, slices_of_run
from trichord.engine.step import Stepper
from trichord.fusion.config import TrunkConfig
from trichord.fusion.trunk import build_trunk
from trichord.layers.initial import OwnSlices, SkipInitialValues
from trichord.release import import_

pytestmark = pytest.mark.distributed

STAGE_3 = {"zero_stage": 3, "precision": "fp32", "timeout_s": 60.0, "lr": 5e-3}
SMALL = 2**10  # bytes that may be open at a time: less than most parameters


def whole_weights(engine) -> dict[str, torch.Tensor]:
    from deepspeed.runtime.zero import GatheredParameters

    weights = {}
    for name, parameter in engine.module.model.named_parameters():
        with GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def build_both(precision: str) -> list[str]:
    """Names of parameters that differ between the two ways to build, bit for bit, and what remains of the memory."""
    facts, _ = start_process_group(60)
    config = EngineConfig.model_validate(STAGE_3 | {"precision": precision})
    engine = build_engine(tiny.build_tiny(), config, micro_rows=4, grad_accum_steps=1)
    expected = whole_weights(engine)
    engine.destroy()
    slices = OwnSlices(facts.rank, facts.world_size, SMALL)
    with building_in(slices):
        model = tiny.build_tiny()
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
    engine = build_engine(model, config, micro_rows=4, grad_accum_steps=1, slices=slices)
    found = whole_weights(engine)
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_of_a_whole_build_bit_for_bit(precision):
    assert run_ranks(2, build_both, precision) == [[], []]


def histories(stages: list[tuple[int, bool]]) -> list:
    out = []
    for stage, zero_init in stages:
        config = EngineConfig.model_validate(STAGE_3 | {"zero_stage": stage, "zero_init": zero_init})
        facts, _ = start_process_group(60)
        slices = slices_of_run(config)
        assert (slices is not None) == (stage == 3 and zero_init and facts.world_size > 1)
        with building_in(slices):
            model = tiny.build_tiny()
        count = tiny.ROWS // (2 * facts.world_size)
        engine = build_engine(model, config, micro_rows=2, grad_accum_steps=count, slices=slices)
        layout = SlotLayout(2 * tiny.MAX_SAMPLES, count)
        stepper = Stepper(engine, tiny.OBJECTIVES, device=torch.device("cpu"), layout=layout, max_grad_norm=1.0)
        out.append(tiny.train_steps(facts, engine, stepper, config, 2, range(4)))
        engine.destroy()
    return out


def test_losses_do_not_depend_on_how_the_model_was_built_nor_on_the_split():
    (alone,) = run_ranks(1, histories, [(0, True)])[0]
    whole, sliced = run_ranks(2, histories, [(3, False), (3, True)])[0]
    assert sliced == whole
    for ours, theirs in zip(sliced, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


class Unusual(nn.Module):
    """What initial values may do beyond one draw per parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 30)
        self.table = nn.Embedding(50, 20, padding_idx=3)
        self.made = nn.Parameter(torch.randn(7, 11).t() * 0.02)  # not contiguous
        self.scale = nn.Parameter(torch.ones(()))
        self.tied = nn.Linear(20, 50, bias=False)
        self.tied.weight = self.table.weight
        self.twin = copy.deepcopy(self.first)  # registers nothing
        nn.init.orthogonal_(self.first.weight)
        nn.init.trunc_normal_(self.twin.weight, std=0.02)
        with torch.no_grad():
            self.first.weight[5:9].mul_(3.0)  # needs the rest of it, which was put away
            self.made.add_(self.first.weight.sum())
            self.scale.copy_(self.table.weight.norm())
        self.register_buffer("noise", torch.randn(5))


def build_unusual() -> list[str]:
    start_process_group(60)
    torch.manual_seed(5)
    expected = Unusual().state_dict()
    torch.manual_seed(5)
    slices = OwnSlices(dist.get_rank(), dist.get_world_size(), 512)
    with slices:
        model = Unusual()
    config = EngineConfig.model_validate(STAGE_3)
    engine = build_engine(model, config, micro_rows=1, grad_accum_steps=1, slices=slices)
    found = whole_weights(engine) | dict(model.named_buffers())
    found["tied.weight"] = found["table.weight"]
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


def test_whatever_initial_values_do_it_is_the_same():
    assert run_ranks(2, build_unusual) == [[], []]


def released_trunk(folder: str) -> list[str]:
    start_process_group(60)
    leaf = TrunkConfig(weights=folder)
    torch.manual_seed(0)
    expected = dict(build_trunk(leaf, 50, {}).named_parameters())
    torch.manual_seed(0)
    slices = OwnSlices(dist.get_rank(), dist.get_world_size(), SMALL)
    with slices:
        trunk = build_trunk(leaf, 50, {})
    wrong = []
    for name, parameter in trunk.named_parameters():
        start, end = slices.share(parameter.numel())
        own = slices.take(parameter)
        if own is None or not torch.equal(own, expected[name].detach().reshape(-1)[start:end]):
            wrong.append(name)
    return wrong


def test_released_weights_come_piece_by_piece(tmp_path):
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert run_ranks(2, released_trunk, str(tmp_path)) == [[], []]  # 44 rows grow to 56: its own draws, the same


def test_weights_to_start_from_are_read_one_at_a_time(monkeypatch):
    model = tiny.build_tiny()
    expected = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    read_so_far: list[weakref.ref] = []
    alive: list[int] = []

    def read(name):
        alive.append(sum(reference() is not None for reference in read_so_far))
        tensor = expected[name].clone()
        read_so_far.append(weakref.ref(tensor))
        return tensor

    stored = StoredWeights({name: tuple(tensor.shape) for name, tensor in expected.items()}, read)
    monkeypatch.setattr(import_, "load_init_weights", lambda place: stored)
    import_.load_initial_weights(model, "somewhere")
    assert len(alive) == len(expected)
    assert max(alive) <= 1
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_nothing_is_drawn_for_weights_that_come_from_a_checkpoint():
    before = torch.get_rng_state()
    with SkipInitialValues():
        linear, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert norm.running_var is not None
    assert torch.equal(norm.running_var, torch.ones(3)), "buffers are no parameters"
    nn.init.ones_(linear.weight)
    assert torch.equal(linear.weight, torch.ones(3, 3)), "only while it is active"
