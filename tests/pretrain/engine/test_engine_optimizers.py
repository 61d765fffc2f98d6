"""What each optimizer computes, against plain formulas; and which one is taken where."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trichord.core.errors import ConfigError
from trichord.engine import compact_moments
from trichord.engine.compact_moments import CompactAdam, unpacked
from trichord.engine.config import EngineConfig
from trichord.engine.matrices import Matrix
from trichord.engine.muon import Muon, orthogonalize
from trichord.engine.optimizers import build_optimizer, empty_state, pack_state

CPU = torch.device("cpu")


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def gradient_like(weight: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 + step))


def test_adam_is_fused_on_a_gpu_unless_its_states_are_in_host_memory():
    def fused(device: str, **engine):
        groups = [{"params": [parameter(3)], "weight_decay": 0.1}]
        return build_optimizer(groups, EngineConfig(**engine), torch.device(device)).param_groups[0]["fused"]

    for optimizer in ("adamw", "adam"):
        assert fused("cuda", optimizer=optimizer) is True
        assert fused("cuda", optimizer=optimizer, optimizer_states="bf16") is True
        assert not fused("cuda", optimizer=optimizer, offload="optimizer", offload_optimizer="torch")
        assert not fused("cpu", optimizer=optimizer)


@pytest.mark.parametrize("decoupled", [True, False])
def test_bf16_moments_are_those_of_the_formula_rounded_after_each_step(decoupled, monkeypatch):
    monkeypatch.setattr(compact_moments, "_AT_A_TIME", 7)  # several blocks, the last one shorter
    weight = parameter(5, 6)
    expected, first, second = weight.detach().double().clone(), torch.zeros(5, 6), torch.zeros(5, 6)
    lr, betas, eps, decay = 0.01, (0.9, 0.95), 1e-8, 0.1
    groups = [{"params": [weight], "weight_decay": decay}]
    optimizer = CompactAdam(groups, lr=lr, betas=betas, eps=eps, decoupled=decoupled, fused=False, store="bf16")
    for step in range(1, 5):
        weight.grad = gradient_like(weight, step)
        optimizer.step()
        gradient = weight.grad.double() + (0.0 if decoupled else decay * expected)
        expected *= 1 - lr * decay if decoupled else 1.0
        new_first = betas[0] * first.double() + (1 - betas[0]) * gradient
        new_second = betas[1] * second.double() + (1 - betas[1]) * gradient**2
        expected -= lr * (new_first / (1 - betas[0] ** step)) / ((new_second / (1 - betas[1] ** step)).sqrt() + eps)
        first, second = new_first.bfloat16().float(), new_second.bfloat16().float()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert torch.allclose(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(state["exp_avg"].float(), first, rtol=2**-7, atol=1e-6)  # rounding may fall either way
    assert torch.allclose(state["exp_avg_sq"].float(), second, rtol=2**-7, atol=1e-6)
    assert int(state["step"]) == 4


def test_a_moment_in_bf16_falls_at_every_beta_that_is_allowed():
    """And not at those that are refused: 2^-8 is where rounding begins to undo the fall."""

    def stays(beta: float) -> bool:
        moment = torch.linspace(1, 2, 129)[:-1].bfloat16()  # every value that bf16 has between 1 and 2
        return bool(((moment.float() * beta).bfloat16() == moment).any())

    assert not stays(1 - 2.0**-8)
    assert stays(0.997)
    with pytest.raises(ValueError, match=r"betas \[0.9, 0.999\]: .* no beta may exceed 0.9961"):
        EngineConfig(optimizer_states="bf16", betas=(0.9, 0.999))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"optimizer": "sgd"}, "for the moments of adamw and adam, got optimizer sgd"),
        ({"offload": "optimizer"}, "set offload_optimizer to torch"),
    ],
)
def test_bf16_moments_where_there_are_none_are_refused(engine, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(optimizer_states="bf16", **engine)


def test_an_empty_state_is_what_the_optimizer_itself_would_have_made():
    for engine in (
        {},
        {"optimizer": "adam", "optimizer_states": "bf16"},
        {"optimizer": "rmsprop"},
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
        {"optimizer": "adamw_8bit"},
    ):
        weight = parameter(4, 3)
        groups = [{"params": [weight], "weight_decay": 0.0, "muon": False}]
        optimizer = build_optimizer(groups, EngineConfig(**engine), CPU)
        weight.grad = gradient_like(weight, 0)
        optimizer.step()
        made = optimizer.state[weight]
        ours = optimizer.state[weight] = empty_state(optimizer, weight, [kind for kind in made if kind != "step"], 1)
        pack_state(optimizer, weight)
        assert ours.keys() == made.keys()
        for kind, value in made.items():
            assert (ours[kind].shape, ours[kind].dtype) == (value.shape, value.dtype), (engine, kind)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(1, 12, 40), (1, 40, 12), (3, 16, 16)])
def test_orthogonal_matrices_have_singular_values_near_1(shape):
    rotations = torch.linalg.svd(parameter(*shape).detach(), full_matrices=False)
    matrices = rotations.U * torch.linspace(0.5, 2.0, min(shape[1:])) @ rotations.Vh
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.65 < values.min() < values.max() < 1.25
    for part, whole in zip(matrices, orthogonalize(matrices)):
        assert torch.allclose(orthogonalize(part[None])[0], whole, atol=1e-5)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torch_s_muon_and_the_rest_is_adamw(alone, scale):
    matrix, vector = parameter(24, 8), parameter(7, seed=1)
    its_matrix, its_vector = nn.Parameter(matrix.detach().clone()), nn.Parameter(vector.detach().clone())
    groups = [
        {"params": [matrix], "muon": True, "weight_decay": 0.1, "lr": 0.02},
        {"params": [vector], "muon": False, "weight_decay": 0.0, "lr": 0.01},
    ]
    adamw = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "fused": None}
    ours = Muon(groups, momentum=0.9, scale=scale, dtype=torch.bfloat16, device=CPU, adamw=adamw)
    ours.place({id(matrix): [(Matrix((1, 24, 8), ((0, 0, 192),), 0, 0),)]})
    theirs = torch.optim.Muon([its_matrix], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=scale)
    rest = torch.optim.AdamW([its_vector], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    start = matrix.detach().clone()
    for step in range(4):
        for weight, twin in ((matrix, its_matrix), (vector, its_vector)):
            weight.grad = gradient_like(weight, step)
            twin.grad = weight.grad.clone()
        for optimizer in (ours, theirs, rest):
            optimizer.step()
    assert torch.equal(vector, its_vector)
    moved = (its_matrix - start).norm()
    assert (matrix - its_matrix).norm() < 0.02 * moved  # both iterate in bf16, and divide by the norm in another order
    assert ours.state[matrix].keys() == {"momentum_buffer"}
    assert ours.state[vector].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_and_bf16_moments_do_not_go_together():
    with pytest.raises(ValueError, match="got optimizer muon"):
        EngineConfig(optimizer="muon", optimizer_states="bf16")


def adamw_8bit(weight: nn.Parameter) -> CompactAdam:
    engine = EngineConfig(optimizer="adamw_8bit", lr=0.01)
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.1}], engine, CPU)
    assert isinstance(optimizer, CompactAdam)
    return optimizer


def test_moments_in_8_bits_are_close_to_those_of_adamw_and_take_a_quarter(monkeypatch):
    monkeypatch.setattr(compact_moments, "_AT_A_TIME", 512)  # several parts, and a last block that is not full
    weight = parameter(50, 101)
    twin = nn.Parameter(weight.detach().clone())
    optimizer = adamw_8bit(weight)
    exact = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        weight.grad = gradient_like(weight, step)
        twin.grad = weight.grad.clone()
        optimizer.step()
        exact.step()
    for kind in ("exp_avg", "exp_avg_sq"):
        stored, true = optimizer.state[weight][kind], exact.state[twin][kind].view(-1)
        assert (unpacked(stored, weight.numel()) - true).norm() < 0.03 * true.norm()
        held = sum(t.numel() * t.element_size() for t in (stored.codes, stored.scales))
        assert held < 0.3 * 4 * weight.numel()
    start = parameter(50, 101).detach()
    assert 0 < (weight - twin).norm() < 0.05 * (twin - start).norm()


def test_decoding_and_coding_again_changes_nothing():
    """What a resume on the same split does."""
    weight = parameter(70, 90)
    optimizer = adamw_8bit(weight)
    weight.grad = gradient_like(weight, 0)
    optimizer.step()
    before = {kind: optimizer.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq")}
    optimizer.state[weight].update({kind: unpacked(moment, weight.numel()) for kind, moment in before.items()})
    optimizer.pack(weight)
    for kind, moment in before.items():
        assert torch.equal(optimizer.state[weight][kind].codes, moment.codes)
        assert torch.equal(optimizer.state[weight][kind].scales, moment.scales)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"needs torchao.*pip install 'trichord\[8bit\]'"):
        adamw_8bit(parameter(3))
