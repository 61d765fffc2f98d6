"""The attention function that transformers calls: packed streams, left-padded generation, clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from trichord.layers.attention import NAME, _capped_attention, packed_attention, register_attention, trichord_attention
from trichord.layers.layout import PackedLayout
from trichord_kernels.reference import attention

# Three segments of 5, 1 and 7 tokens (an image block at 7..11 of the last), then slack.
CU_SEQLENS = torch.tensor([0, 5, 6, 13, 16], dtype=torch.int32)
SEGMENTS = torch.tensor([0] * 5 + [1] + [2] * 7 + [-1] * 3, dtype=torch.int32)
SPAN_ENDS = torch.tensor([*range(1, 8), 11, 11, 11, 11, 12, 13, 14, 15, 16], dtype=torch.int32)


def qkv(num_heads: int = 4, num_kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, num_heads, 16, 8), (1, num_kv_heads, 16, 8), (1, num_kv_heads, 16, 8)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)


def attend_by_definition(q, k, v, span_ends):
    """Query t sees key j of its own run with j < max(t + 1, span_ends[t]); one query at a time, slack zero."""
    out = torch.zeros_like(q)
    bounds = CU_SEQLENS.tolist()
    for t in range(13):
        start = max(b for b in bounds if b <= t)
        end = min(b for b in bounds if b > t)
        last = min(end, max(t + 1, span_ends[t]))
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores = (k[0, shared, start:last] @ q[0, head, t]) * 0.3
            out[0, head, t] = scores.softmax(0) @ v[0, shared, start:last]
    return out.transpose(1, 2)


@pytest.mark.parametrize("spans", [SPAN_ENDS, None])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_packed_attention_is_the_rule(spans, heads):
    layout = PackedLayout.build(CU_SEQLENS, SEGMENTS, spans)
    ends = torch.arange(1, 17) if spans is None else spans
    inputs = qkv(*heads)
    expected = attend_by_definition(*inputs, ends.tolist())
    got = packed_attention(*inputs, layout, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(got.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_slack_costs_nothing_and_leaks_nothing():
    inputs = [torch.where(torch.arange(16)[:, None] < 13, t, float("nan")) for t in qkv()]
    out = packed_attention(*inputs, PackedLayout.build(CU_SEQLENS, SEGMENTS, SPAN_ENDS), 0.3)
    assert torch.isfinite(out).all()
    assert not out[:, 13:].any()


def build_lm() -> Qwen3ForCausalLM:
    register_attention()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=NAME,
    )
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


PROMPTS = [[5, 9, 11, 30, 7, 8], [21, 6], [13, 14, 15, 2]]


def generate_all(model) -> tuple[list, list]:
    """Left-padded together, and one by one."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, longest:].tolist()
    alone = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS
    ]
    return together, alone


def test_left_padded_generation_equals_one_by_one():
    together, alone = generate_all(build_lm())
    assert together == alone


def test_a_static_cache_gives_the_same_tokens():
    model = build_lm()
    prompt = torch.tensor(PROMPTS[:1])
    generated = [
        model.generate(prompt, max_new_tokens=12, do_sample=False, cache_implementation=kind, disable_compile=True)
        for kind in ("dynamic", "static")
    ]
    assert torch.equal(*generated)


def test_softcap_with_a_static_cache_equals_eager():
    register_attention()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        attn_logit_softcapping=2.0,
        eos_token_id=None,
    )
    model = Gemma2ForCausalLM(config).eval()
    generated = []
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        generated.append(
            model.generate(
                torch.tensor(PROMPTS[:1]),
                max_new_tokens=12,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
            )
        )
    assert torch.equal(*generated)


def test_softcap_with_a_dense_mask_equals_the_kernel_s_rule():
    q, k, v = (t.detach() for t in qkv())
    mask = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    got = _capped_attention(q, k, v, mask, True, 0.3, 2.0, 0.0)
    flat = (t[0].transpose(0, 1) for t in (q, k, v))
    want = attention(*flat, torch.tensor([0, 16], dtype=torch.int32), softcap=2.0, scale=0.3)
    torch.testing.assert_close(got[0].float(), want.float())


def test_without_the_mask_registration_left_padding_would_be_wrong(monkeypatch):
    """Why both registrations are needed; if this fails, transformers has changed and ours can be simpler."""
    model = build_lm()
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    together, alone = generate_all(model)
    assert together != alone


def test_registration_is_known_to_transformers_twice():
    register_attention()
    register_attention()
    assert NAME in AttentionInterface._global_mapping
    assert NAME in AttentionMaskInterface._global_mapping


def test_a_packed_stream_with_a_cache_is_refused():
    model = build_lm()
    layout = PackedLayout.build(torch.tensor([0, 4]), torch.zeros(4), None)
    with pytest.raises(ValueError, match="batch size 1 and no cache, got batch 2"):
        model.model(input_ids=torch.ones(2, 4, dtype=torch.long), packed_layout=layout)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cache"])
def test_arguments_that_would_be_ignored_are_refused(name):
    with pytest.raises(ValueError, match=f"does not offer {name}"):
        trichord_attention(torch.nn.Module(), *qkv(), None, **{name: torch.zeros(1)})


def test_dropout_and_foreign_masks_are_refused():
    with pytest.raises(ValueError, match=r"expected dropout 0, got 0\.1"):
        trichord_attention(torch.nn.Module(), *qkv(), None, dropout=0.1)
    with pytest.raises(ValueError, match=r"expected a mask of 4 dimensions, got \(1, 16\)"):
        trichord_attention(torch.nn.Module(), *qkv(), torch.ones(1, 16))
