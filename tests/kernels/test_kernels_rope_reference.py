"""The plain-torch rope: the public models' numbers, exact gradients, clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from trichord_kernels.reference import rope
from trichord_kernels.reference.rope import assign_axes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, N, K, H = 13, 4, 2, 128
INV_FREQ = 10000.0 ** -(torch.arange(0, H, 2).float() / H)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _heads(dtype=torch.float32):
    return torch.randn(T, N, H).to(dtype), torch.randn(T, K, H).to(dtype)


def _public(q, k, cos, sin):
    """transformers' rotation of (T, N, H) by its cos and sin (1, T, H)."""
    out = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return tuple(x[0].transpose(0, 1) for x in out)


def _equal(ours, public) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, public))


@pytest.mark.parametrize("rope_type", ["default", "llama3", "yarn"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_llama_bit_for_bit(dtype, rope_type) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    if rope_type == "default":
        parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=N * H, num_attention_heads=N, rope_parameters=parameters)
    rotary = LlamaRotaryEmbedding(config)
    q, k = _heads(dtype)
    positions = torch.randint(0, 100_000, (T,))
    ours = rope(q, k, positions, rotary.inv_freq, attention_scaling=rotary.attention_scaling)
    assert (rotary.attention_scaling != 1.0) == (rope_type == "yarn")
    assert _equal(ours, _public(q, k, *rotary(q, positions[None])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_equal_qwen3_bit_for_bit(dtype) -> None:
    norms = [Qwen3RMSNorm(H, eps=1e-5).to(dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    q, k = _heads(dtype)
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=N * H, num_attention_heads=N))
    positions = torch.arange(T)
    weights = {"q_weight": norms[0].weight, "k_weight": norms[1].weight}
    ours = rope(q, k, positions, rotary.inv_freq, eps=1e-5, **weights)
    assert _equal(ours, _public(norms[0](q), norms[1](k), *rotary(q, positions[None])))
    only_q = rope(q, k, positions, rotary.inv_freq, eps=1e-5, q_weight=norms[0].weight)
    assert _equal(only_q, _public(norms[0](q), k, *rotary(q, positions[None])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config_class", "rotary_class", "layout", "sections"),
    [
        (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, "sectioned", (16, 24, 24)),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, "interleaved", (24, 20, 20)),
    ],
)
def test_equals_qwens_of_three_axes_bit_for_bit(config_class, rotary_class, layout, sections, dtype) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    config = config_class(hidden_size=N * H, num_attention_heads=N, head_dim=H, rope_parameters=parameters)
    rotary = rotary_class(config)
    q, k = _heads(dtype)
    positions = torch.randint(0, 1000, (3, T))
    ours = rope(q, k, positions, rotary.inv_freq, sections=sections, layout=layout)
    assert _equal(ours, _public(q, k, *rotary(q, positions[:, None])))


def test_axes_are_dealt_in_turn_or_in_blocks() -> None:
    assert assign_axes((3, 3, 2), "interleaved") == [0, 1, 2, 0, 1, 2, 0, 1]
    assert assign_axes((4, 1, 1), "interleaved") == [0, 1, 2, 0, 0, 0]
    assert assign_axes((2, 0, 0), "interleaved") == [0, 0]
    assert assign_axes((2, 1, 3), "interleaved") == [0, 1, 2, 0, 2, 2]
    assert assign_axes((2, 1, 3), "sectioned") == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
def test_equal_axes_give_exactly_the_one_axis_result(layout) -> None:
    q, k = _heads()
    positions = torch.rand(T) * 1000
    one = rope(q, k, positions, INV_FREQ)
    arguments = {"sections": (24, 20, 20), "layout": layout}
    assert _equal(one, rope(q, k, positions.expand(3, T), INV_FREQ, **arguments))
    assert _equal(one, rope(q, k, positions, INV_FREQ, **arguments))
    assert _equal(one, rope(q, k, positions[None], INV_FREQ))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float64])
def test_positions_of_any_number_type(dtype) -> None:
    q, k = _heads()
    positions = torch.arange(T)
    assert _equal(rope(q, k, positions.to(dtype), INV_FREQ), rope(q, k, positions, INV_FREQ))


def test_fractional_positions_lie_between_whole_ones() -> None:
    q, k = _heads()
    half, _ = rope(q, k, torch.full((T,), 0.5), INV_FREQ)
    twice, _ = rope(half, k, torch.full((T,), 0.5), INV_FREQ)
    torch.testing.assert_close(twice, rope(q, k, torch.ones(T), INV_FREQ)[0])


def test_partial_rotary_passes_the_rest_through() -> None:
    q, k = _heads()
    positions = torch.arange(T)
    turned = rope(q, k, positions, INV_FREQ[:20])
    front = rope(q[..., :40], k[..., :40], positions, INV_FREQ[:20])
    for ours, first, x in zip(turned, front, (q, k)):
        assert torch.equal(ours[..., :40], first)
        assert torch.equal(ours[..., 40:], x[..., 40:])


def test_gradients_are_exact() -> None:
    q, k = (torch.randn(3, n, 10, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    weights = [torch.randn(10, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    positions = torch.rand(3, 3) * 9

    def turn(q, k, q_weight, k_weight):
        return rope(q, k, positions, INV_FREQ[:4], sections=(2, 1, 1), q_weight=q_weight, k_weight=k_weight)

    assert torch.autograd.gradcheck(turn, (q, k, *weights))


def test_autocast_changes_nothing() -> None:
    q, k = _heads(torch.bfloat16)
    operands = (q, k, torch.arange(T), INV_FREQ)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rope(*operands, q_weight=torch.ones(H))
    assert _equal(under, rope(*operands, q_weight=torch.ones(H)))
    assert under[0].dtype == torch.bfloat16


Q, P = torch.zeros(3, 2, 8), torch.zeros(3)
F4 = torch.ones(4)


@pytest.mark.parametrize(
    ("operands", "keywords", "words"),
    [
        ((Q[0], Q[0], P, F4), {}, ["(2, 8)", "flatten"]),
        ((Q, Q[:2], P, F4), {}, ["(2, 2, 8)"]),
        ((Q, Q.half(), P, F4), {}, ["float16", "cast"]),
        ((Q, Q, P, torch.ones(5)), {}, ["H = 8", "(5,)"]),
        ((Q, Q, P, F4.bfloat16()), {}, ["float32", "bfloat16", "when the module is cast"]),
        ((Q, Q, P, F4), {"layout": "dealt"}, ["interleaved, sectioned", "'dealt'"]),
        ((Q, Q, P, F4), {"sections": (2, 1)}, ["4 frequencies", "(2, 1)", "sum 3"]),
        ((Q, Q, P, F4), {"sections": (5, -1)}, ["(5, -1)"]),
        ((Q, Q, P[:2], F4), {}, ["(3,)", "(2,)"]),
        ((Q, Q, P.expand(2, 3), F4), {"sections": (2, 1, 1)}, ["(3, 3)", "(2, 3)", "one row per axis"]),
        ((Q, Q, P.expand(3, 3), F4), {}, ["(1, 3)", "sections None"]),
        ((Q, Q, P, F4), {"q_weight": torch.ones(4)}, ["q_weight (8,)", "(4,)"]),
        ((Q, Q, P, F4), {"k_weight": torch.ones(8).half()}, ["k_weight", "float16"]),
    ],
)
def test_refuses_operands_that_do_not_fit(operands, keywords, words) -> None:
    with pytest.raises(ValueError, match="rope: expected") as caught:
        rope(*operands, **keywords)
    assert all(word in str(caught.value) for word in words), caught.value
