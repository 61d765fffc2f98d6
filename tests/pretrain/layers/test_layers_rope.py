"""Multi-axis rotary positions: exact where the axes are equal, and on each axis what the frequencies say."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trichord.core.errors import ConfigError
from trichord.layers.rope import MultiAxisRotary, assign_axes, replace_rotary, resolve_sections

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


def build_pair(family: str = "qwen3", rope: dict | None = None) -> tuple[torch.nn.Module, MultiAxisRotary]:
    """The untouched rotary module of transformers, and ours made from it."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    rope = rope or {"rope_type": "default", "rope_theta": 10_000.0}
    decoder = model_class(config_class(**SMALL, head_dim=16, rope_parameters=rope)).model
    theirs = decoder.rotary_emb
    return theirs, replace_rotary(decoder, None)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_equal_axes_give_exactly_the_one_axis_result_of_transformers(family, rope):
    theirs, ours = build_pair(family, rope)
    x, positions = torch.zeros(1, 300, 4), torch.arange(300)[None]
    expected = theirs(x, positions)
    for given in (positions, positions.float(), positions.float()[None].expand(3, -1, -1)):
        for got, want in zip(ours(x, given), expected):
            assert torch.equal(got, want)


def test_each_frequency_follows_its_own_axis():
    _, ours = build_pair()
    x = torch.zeros(1, 1, 4)
    axes = assign_axes(ours.sections)
    still = ours(x, torch.zeros(3, 1, 1))[0]
    for axis in range(3):
        moved = torch.zeros(3, 1, 1)
        moved[axis] = 2.0
        changed = (ours(x, moved)[0] != still)[0, 0, : len(axes)]
        assert changed.tolist() == [a == axis for a in axes]


@pytest.mark.parametrize(
    ("sections", "axes"), [((3, 3, 2), [0, 1, 2, 0, 1, 2, 0, 1]), ((4, 1, 1), [0, 1, 2, 0, 0, 0]), ((2, 0, 0), [0, 0])]
)
def test_axes_are_dealt_in_turn(sections, axes):
    assert assign_axes(sections) == axes


@pytest.mark.parametrize(("head_dim", "sections"), [(16, (4, 2, 2)), (12, (2, 2, 2)), (128, (22, 21, 21))])
def test_default_sections_share_all_frequencies(head_dim, sections):
    assert resolve_sections(None, head_dim) == sections
    assert sum(sections) * 2 == head_dim


def test_a_bf16_module_keeps_its_angles():
    _, ours = build_pair()
    positions = torch.arange(5000)[None]
    expected = ours(torch.zeros(1), positions)[0]
    assert torch.equal(ours.bfloat16()(torch.zeros(1), positions)[0], expected)


def test_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        _, planned = build_pair()
    _, real = build_pair()
    positions = torch.arange(7)[None]
    assert torch.equal(planned(torch.zeros(1), positions)[0], real(torch.zeros(1), positions)[0])


def test_sections_that_do_not_fit_name_both_numbers():
    with pytest.raises(ConfigError, match=r"\(1, 2, 3\) sum to 6, but the trunk has 8"):
        MultiAxisRotary(torch.ones(8), 1.0, (1, 2, 3))


def test_frequencies_that_move_with_the_length_are_refused():
    with pytest.raises(ConfigError, match="'dynamic' is not supported; expected one of"):
        build_pair(rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
