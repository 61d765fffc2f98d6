"""`attn_implementation="trichord"` in untouched transformers models: outputs and every gradient equal theirs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from trichord.layers.attention import NAME, register_attention

VOCABULARY = 41
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
WINDOW = 4
# Name of the case: config, and transformers' own implementation to compare with.
MODELS = {
    "llama": (LlamaConfig(**SMALL), "sdpa"),
    "qwen3": (Qwen3Config(**SMALL), "sdpa"),
    "qwen3_window": (
        Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "sdpa",
    ),
    "mistral_window": (MistralConfig(**SMALL, sliding_window=WINDOW), "sdpa"),
    "gemma2_softcap": (
        Gemma2Config(**SMALL, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
        "eager",
    ),
    "gemma3": (Gemma3TextConfig(**SMALL, sliding_window=WINDOW, query_pre_attn_scalar=8), "sdpa"),
}
LENGTHS = (9, 1, 6)


def build_pair(name: str) -> tuple[Any, Any]:
    """The same random model twice: with our attention, and with transformers' own."""
    register_attention()
    config, implementation = MODELS[name]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(NAME)
    return ours, theirs


def assert_same(ours: Any, theirs: Any, inputs: dict[str, Any], theirs_inputs: dict[str, Any], rows: Tensor) -> None:
    """Logits at `rows` (B, L) bool, and every gradient of a fixed random sum of them, to 1e-5 of their largest."""
    logits = [model(**given).logits for model, given in ((ours, inputs), (theirs, theirs_inputs))]
    torch.manual_seed(1)
    weights = torch.randn_like(logits[1]) * rows[..., None]
    torch.testing.assert_close(logits[0][rows], logits[1][rows], rtol=1e-5, atol=1e-5)
    for model, result in zip((ours, theirs), logits):
        model.zero_grad()
        (result * weights).sum().backward()
    for (parameter_name, got), want in zip(ours.named_parameters(), theirs.parameters()):
        assert want.grad is not None
        bound = 1e-5 * want.grad.abs().max().item()
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=bound, msg=parameter_name)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "right", "left", "both", "holes"])
def test_padded_batches(name: str, padding: str) -> None:
    ours, theirs = build_pair(name)
    mask = torch.ones(3, 9, dtype=torch.long)
    if padding in ("right", "both"):
        mask[0, 5:] = 0
    if padding in ("left", "both"):
        mask[1, :3] = 0
    if padding == "holes":
        mask[1, 2:4] = 0
    inputs = {"input_ids": random_ids(3, 9), "attention_mask": mask}
    assert_same(ours, theirs, inputs, inputs, mask.bool())


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_rows_of_padding_get_what_a_dense_mask_gives_them(name: str) -> None:
    """So labels left on padding cost the same loss; compared with sdpa, whose blind rows are zeros as ours."""
    ours, theirs = build_pair(name)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    inputs = {"input_ids": random_ids(2, 7), "attention_mask": mask}
    assert_same(ours, theirs, inputs, inputs, torch.ones_like(mask).bool())


class OneByOne(torch.nn.Module):
    """A model that runs sequences of `LENGTHS` by themselves and puts their logits end to end."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = [self.model(input_ids=part).logits for part in input_ids.split(LENGTHS, dim=1)]
        return SimpleNamespace(logits=torch.cat(logits, dim=1))


def flattened(collator_options: dict[str, Any]) -> dict[str, Any]:
    ids = random_ids(1, sum(LENGTHS))[0]
    collate = DataCollatorWithFlattening(return_tensors="pt", **collator_options)
    batch = dict(collate([{"input_ids": part.tolist()} for part in ids.split(LENGTHS)]))
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flash", [True, False], ids=["cu_seq_lens", "positions"])
def test_flattened_sequences_equal_sequences_alone(name: str, flash: bool) -> None:
    """What transformers' flattening collator gives, against each sequence by itself.

    By positions alone transformers finds the sequences only without a cache, whatever the implementation.
    """
    ours, theirs = build_pair(name)
    batch = flattened({"return_flash_attn_kwargs": flash})
    assert ("cu_seq_lens_q" in batch) == flash
    rows = torch.ones_like(batch["input_ids"]).bool()
    inputs = batch if flash else {**batch, "use_cache": False}
    assert_same(ours, OneByOne(theirs), inputs, {"input_ids": batch["input_ids"]}, rows)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_bidirectional_encoder(padding: str) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    register_attention()
    torch.manual_seed(0)
    theirs = BertModel(config, add_pooling_layer=False).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(NAME)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, {"none": slice(0), "right": slice(4, None), "left": slice(2)}[padding]] = 0
    inputs = {"input_ids": random_ids(2, 6), "attention_mask": mask}
    got, want = (model(**inputs).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_generation(name: str) -> None:
    """Greedy, far past the window: prefill and decoding with a cache."""
    ours, theirs = build_pair(name)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    generated = [
        model.generate(random_ids(3, 6), attention_mask=mask, max_new_tokens=12, do_sample=False)
        for model in (ours, theirs)
    ]
    assert torch.equal(*generated)
