"""Trunks that start from a released checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trichord import ENCODERS, OBJECTIVES, Item, tiny_batch, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trichord.core.errors import ConfigError
from trichord.fusion.config import FusionConfig, TrunkConfig
from trichord.fusion.trunk import build_trunk, padded_vocab_size, trunk_config

SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2}


@pytest.fixture
def released(tmp_path):
    """A Llama of 44 tokens whose sizes are none of the leaf's defaults."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def leaf(path, **changes) -> TrunkConfig:
    return TrunkConfig(weights=str(path), **changes)


def test_weights_are_the_released_ones_and_new_tokens_get_rows(released):
    theirs = load_file(released / "model.safetensors")
    trunk = build_trunk(leaf(released), 50, SPECIAL)
    own = trunk.state_dict()
    assert padded_vocab_size(50) == 56 == own["model.embed_tokens.weight"].shape[0] == own["lm_head.weight"].shape[0]
    assert own.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(own[name][: weight.shape[0]], weight.float()), name
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}


def test_a_larger_released_vocabulary_is_kept(released):
    assert build_trunk(leaf(released), 30, SPECIAL).config.vocab_size == 44
    assert trunk_config(leaf(released), 30, SPECIAL).vocab_size == 44


def test_the_meta_device_plans_the_same_shapes_without_weights(released):
    real = build_trunk(leaf(released), 50, SPECIAL)
    (released / "model.safetensors").unlink()
    with torch.device("meta"):
        planned = build_trunk(leaf(released), 50, SPECIAL)
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in planned.named_parameters()} == shapes


def test_the_whole_model_around_it_runs(released):
    model = tiny_model(ENCODERS, FusionConfig(trunk=leaf(released)), OBJECTIVES)
    out = model(tiny_batch([Item(True, 900, 3)]))
    out.next_token_loss_sum.backward()
    assert torch.isfinite(out.next_token_loss_sum)


def test_its_own_rope_sections_are_checked_against_its_head_dim(released):
    build_trunk(leaf(released, rope_sections=(4, 2, 2)), 50, SPECIAL)
    with pytest.raises(ConfigError, match=r"\(2, 2, 2\) sum to 6, but the trunk has 8"):
        build_trunk(leaf(released, rope_sections=(2, 2, 2)), 50, SPECIAL)


def test_an_incomplete_checkpoint_is_refused(released):
    weights = load_file(released / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is incomplete: 1 missing keys \(model.norm.weight\)"):
        build_trunk(leaf(released), 50, SPECIAL)


def test_a_checkpoint_without_weights_is_refused(released):
    (released / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_trunk(leaf(released), 50, SPECIAL)


def test_other_families_are_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a 'gpt2' model; expected one of"):
        build_trunk(leaf(tmp_path), 50, SPECIAL)


def test_sliding_windows_are_refused(released):
    config = json.loads((released / "config.json").read_text())
    config |= {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    config.pop("layer_types", None)
    (released / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="sliding-window attention, which is not supported"):
        trunk_config(leaf(released), 50, SPECIAL)


def test_nothing_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no transformers checkpoint there"):
        build_trunk(leaf(tmp_path / "nothing"), 50, SPECIAL)
