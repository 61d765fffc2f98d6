"""Multi-axis rotary positions: exact where the axes are equal, and on each axis what the frequencies say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from trichord.core.errors import ConfigError
from trichord.layers.rope import KeyNorm, QueryNorm, Rotary, replace_rotary, resolve_sections
from trichord_kernels.reference.rope import assign_axes

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SECTIONS = (4, 2, 2)


def build_pair(
    family: str = "qwen3", rope: dict | None = None, sections: tuple[int, int, int] | None = SECTIONS
) -> tuple[torch.nn.Module, Rotary]:
    """The untouched rotary module of transformers, and ours made from it."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    rope = rope or {"rope_type": "default", "rope_theta": 10_000.0}
    decoder = model_class(config_class(**SMALL, head_dim=16, rope_parameters=rope)).model
    theirs = decoder.rotary_emb
    return theirs, replace_rotary(decoder, sections)


def heads(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """q (B, 2, L, 16) and k (B, 1, L, 16)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, n, length, 16, generator=generator) for n in (2, 1))
    return q, k


def turn(rotary: Rotary, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, on (B, N, L, H) like transformers'."""
    batch, _, length, _ = q.shape
    rotation = rotary(torch.zeros(batch, length, 1), positions)
    rows = rotation.turn(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k)))
    return tuple(t.unflatten(0, (batch, length)).transpose(1, 2) for t in rows)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", [None, LLAMA3, YARN])
@pytest.mark.parametrize("sections", [None, SECTIONS])
def test_equal_axes_give_exactly_the_one_axis_result_of_transformers(family, rope, sections):
    theirs, ours = build_pair(family, rope, sections)
    q, k = heads(2, 150)
    positions = torch.arange(150)[None]
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions))
    given = [positions, positions.float(), positions.expand(2, -1)]
    if sections:
        given.append(positions.float()[None].expand(3, -1, -1))
    for some in given:
        for got, want in zip(turn(ours, q, k, some), expected):
            assert torch.equal(got, want)


def test_each_frequency_follows_its_own_axis():
    _, ours = build_pair()
    q, k = heads(1, 1)
    axes = assign_axes(SECTIONS, "interleaved")
    still = turn(ours, q, k, torch.zeros(3, 1, 1))[0]
    for axis in range(3):
        moved = torch.zeros(3, 1, 1)
        moved[axis] = 2.0
        changed = (turn(ours, q, k, moved)[0] != still)[0, 0, 0, : len(axes)]
        assert changed.tolist() == [a == axis for a in axes]


def test_query_and_key_norm_in_front_equal_two_modules_and_a_rotation():
    theirs, ours = build_pair()
    q, k = heads(2, 5)
    norms = [Qwen3RMSNorm(16, eps=1e-5) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    positions = torch.arange(5)[None]
    expected = apply_rotary_pos_emb(norms[0](q), norms[1](k), *theirs(q, positions))
    query_norm, key_norm = QueryNorm.in_place_of(norms[0]), KeyNorm.in_place_of(norms[1])
    assert query_norm.weight is norms[0].weight
    rows = (t.transpose(1, 2).flatten(0, 1) for t in (q, k))
    got = query_norm(*rows, ours(torch.zeros(2, 5, 1), positions), key_norm)
    for one, want in zip(got, expected):
        assert torch.equal(one.unflatten(0, (2, 5)).transpose(1, 2), want)


def test_both_norms_are_inside_their_forward_when_the_weights_are_read():
    """Hooks around a module's forward gather its weights under ZeRO-3."""
    query_norm, key_norm = (norm(torch.nn.Parameter(torch.ones(16)), 1e-6) for norm in (QueryNorm, KeyNorm))
    inside: list[str] = []

    class Probe:
        def turn(self, q, k, q_weight, k_weight, eps):
            inside.append("turned")
            return q, k

    for name, module in (("query", query_norm), ("key", key_norm)):
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(f"{name} in"))
        module.register_forward_hook(lambda *_, name=name: inside.append(f"{name} out"))
    query_norm(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), Probe(), key_norm)
    assert inside == ["query in", "key in", "turned", "key out", "query out"]


@pytest.mark.parametrize(("head_dim", "sections"), [(16, (4, 2, 2)), (12, (2, 2, 2)), (128, (22, 21, 21))])
def test_default_sections_share_all_frequencies(head_dim, sections):
    assert resolve_sections(None, head_dim) == sections
    assert sum(sections) * 2 == head_dim


def test_a_bf16_module_keeps_its_angles():
    _, ours = build_pair()
    q, k = heads(1, 500)
    positions = torch.arange(5000, 5500)[None]
    expected = turn(ours, q, k, positions)
    assert torch.equal(turn(copy.deepcopy(ours).bfloat16(), q, k, positions)[0], expected[0])


def test_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        _, planned = build_pair()
    _, real = build_pair()
    q, k = heads(1, 7)
    positions = torch.arange(7)[None]
    assert torch.equal(turn(planned, q, k, positions)[0], turn(real, q, k, positions)[0])


def test_sections_that_do_not_fit_name_both_numbers():
    with pytest.raises(ConfigError, match=r"\(1, 2, 3\) sum to 6, but the trunk has 8"):
        Rotary(torch.ones(8), 1.0, (1, 2, 3))


def test_frequencies_that_move_with_the_length_are_refused():
    with pytest.raises(ConfigError, match="'dynamic' is not supported; expected one of"):
        build_pair(rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
