"""The loss head: a plain cross-entropy sum, in chunks too, and tied weights that stay tied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from trichord.layers import loss
from trichord.layers.loss import LMHead, replace_lm_head
from trichord.layers.norm import RMSNorm, replace_rms_norms


def build_lm(tie: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("chunk", [1, 3 * 50, 2**25])
def test_loss_and_gradients_equal_plain_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    head = LMHead(8, 50, bias=False).double()
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (10,))
    ours = head(hidden, labels)
    expected = F.cross_entropy(hidden @ head.weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, head.weight)), torch.autograd.grad(expected, (hidden, head.weight))
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_of_bf16_logits_is_summed_in_fp32():
    head = LMHead(8, 50, bias=False).bfloat16()
    assert head(torch.randn(4, 8).bfloat16(), torch.zeros(4, dtype=torch.long)).dtype == torch.float32


def test_without_labels_it_is_the_linear_map():
    head = LMHead(8, 50, bias=False)
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_keeps_the_parameter_object(tie):
    model = build_lm(tie)
    weight = model.lm_head.weight
    replace_lm_head(model)
    assert type(model.lm_head) is LMHead
    assert model.lm_head.weight is weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_norms_keep_parameters_and_names():
    model = build_lm(True)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert replace_rms_norms(model) == 5  # two per layer and the last one
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert type(model.model.norm) is RMSNorm
    assert model.model.norm.variance_epsilon == model.config.rms_norm_eps
    assert replace_rms_norms(model) == 0
