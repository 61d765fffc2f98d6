"""The loss head: a plain cross-entropy sum with its options, and tied weights that stay tied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

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


def test_loss_and_gradients_equal_plain_cross_entropy():
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


def test_smoothing_and_z_loss_are_of_training_only():
    torch.manual_seed(0)
    head = LMHead(8, 50, bias=False)
    head.label_smoothing, head.z_loss = 0.1, 1e-2
    hidden, labels = torch.randn(10, 8), torch.randint(0, 50, (10,))
    logits = head(hidden)
    z_loss = 1e-2 * logits.logsumexp(1).square().sum()
    smoothed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(head(hidden, labels), smoothed + z_loss)
    torch.testing.assert_close(head.eval()(hidden, labels), F.cross_entropy(logits, labels, reduction="sum"))


def test_the_cap_is_of_the_logits_and_of_their_loss():
    torch.manual_seed(0)
    model = build_lm(False)
    model.config.final_logit_softcapping = 2.0
    head = replace_lm_head(model)
    hidden, labels = 100 * torch.randn(10, 16), torch.randint(0, 24, (10,))
    raw = F.linear(hidden, head.weight)
    assert torch.equal(head(hidden), 2.0 * torch.tanh(raw / 2.0))
    assert raw.abs().max() > 2.0
    torch.testing.assert_close(head(hidden, labels), F.cross_entropy(head(hidden), labels, reduction="sum"))


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
