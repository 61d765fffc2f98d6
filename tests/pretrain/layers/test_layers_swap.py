"""What users do to a model after `swap_kernels`: resize it, train on its last tokens, generate with a static cache."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from trichord.core.errors import ConfigError
from trichord.layers.swap import swap_kernels

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = torch.arange(18).view(2, 9) % 50


def pair(config=None):
    """An untouched model, and its copy with our kernels."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()
    return model, swap_kernels(copy.deepcopy(model))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generation_with_a_window_and_any_cache(cache):
    model, swapped = pair(MistralConfig(**SIZES, sliding_window=4))
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.generate(IDS, **options), swapped.generate(IDS, **options))


def test_a_resized_head_still_gives_the_loss():
    model, swapped = pair()
    for each in (model, swapped):
        torch.manual_seed(1)
        each.resize_token_embeddings(60, mean_resizing=False)
        each.train()
    swapped.lm_head.weight.data.copy_(model.lm_head.weight)
    torch.testing.assert_close(swapped(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss)
    assert swapped(IDS, labels=IDS).logits is None


def test_the_loss_of_the_last_tokens_only():
    model, swapped = pair()
    labels = IDS[:, -3:]
    want = model.train()(IDS, labels=labels, logits_to_keep=3).loss
    torch.testing.assert_close(swapped.train()(IDS, labels=labels, logits_to_keep=3).loss, want)


def test_a_model_that_is_refused_stays_as_it_was():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=rope))
    before = model.config._attn_implementation, [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="dynamic"):
        swap_kernels(model)
    assert before == (model.config._attn_implementation, [type(module) for module in model.modules()])
