"""`swap_kernels` against the untouched transformers model: losses, gradients, training, generation, names."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from trichord.core.errors import ConfigError
from trichord.layers.recompute import recompute_blocks
from trichord.layers.swap import swap_kernels

VOCABULARY = 41
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3_tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
}


def build_pair(name: str, spread: float = 0.2) -> tuple[Any, Any]:
    """The same random model twice: swapped, and untouched with transformers' eager attention."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return swap_kernels(copy.deepcopy(theirs)).train(), theirs.train()


def random_batch(seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    """(4, 12) token ids; the first row padded on the right, its padding and some tokens without a label."""
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[0, 7:] = 0
    labels[mask == 0] = -100
    labels[2, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_gradients_equal(ours: Any, theirs: Any, bound: float) -> None:
    """Every gradient, to `bound` of its own largest entry."""
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        want = wanted[name].grad
        assert want is not None, name
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=bound * want.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_loss_and_every_gradient(name: str, recompute: Literal["none", "full", "selective"]) -> None:
    """Measured worst gradient difference 1.6e-6 of its largest entry."""
    ours, theirs = build_pair(name)
    recompute_blocks(ours.model.layers, recompute)
    batch = {**random_batch(), "use_cache": False}  # what runs twice must not fill a cache twice
    got, want = ours(**batch), theirs(**batch)
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    for loss in (got.loss, want.loss):
        loss.backward()
    assert_gradients_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_twenty_steps_of_training_give_the_same_losses(name: str) -> None:
    """AdamW, fp32. Measured worst difference of a loss 4.8e-7."""
    losses = []
    for model in build_pair(name, spread=0.02):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        taken = []
        for step in range(20):
            loss = model(**random_batch(step % 4)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(loss.item())
        losses.append(torch.tensor(taken))
    ours, theirs = losses
    assert theirs[-1] < 0.8 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_gives_loss_logits_and_hidden_states(name: str) -> None:
    ours, theirs = (model.eval() for model in build_pair(name))
    batch = random_batch()
    got, want = (model(**batch, output_hidden_states=True) for model in (ours, theirs))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-5, atol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for ours_hidden, theirs_hidden in zip(got.hidden_states, want.hidden_states):
        torch.testing.assert_close(ours_hidden[real], theirs_hidden[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_generation(name: str) -> None:
    ours, theirs = (model.eval() for model in build_pair(name))
    ids = random_batch(padded=False)["input_ids"][:, :6]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generated = [
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for model in (ours, theirs)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_parameters_stay(name: str) -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    assert swap_kernels(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert list(model.state_dict()) == keys
    assert all(after[key] is before[key] for key in before)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_copy_runs_by_itself() -> None:
    ours, _ = build_pair("qwen3")
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**random_batch()).loss.item() == pytest.approx(torch.tensor(float(VOCABULARY)).log().item())
    assert ours(**random_batch()).loss.item() != twin(**random_batch()).loss.item()


def test_the_count_of_a_trainer_and_given_shifts() -> None:
    """`num_items_in_batch` divides the sum; `shift_labels` are taken as they are."""
    ours, theirs = build_pair("llama")
    batch = random_batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in ({"num_items_in_batch": 100}, {"num_items_in_batch": torch.tensor(77)}, {"shift_labels": shifted}):
        torch.testing.assert_close(ours(**batch, **extra).loss, theirs(**batch, **extra).loss, rtol=1e-6, atol=1e-6)
    assert isinstance(ours(**batch, return_dict=False), tuple)


def test_a_batch_without_labels_costs_nothing() -> None:
    ours, _ = build_pair("llama")
    batch = random_batch()
    loss = ours(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_a_decoder_alone() -> None:
    _, theirs = build_pair("qwen3")
    bare = swap_kernels(copy.deepcopy(theirs).model)
    ids = random_batch()["input_ids"]
    torch.testing.assert_close(
        bare(input_ids=ids).last_hidden_state, theirs.model(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5
    )


def test_unsupported_models_are_refused_by_name() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(ConfigError, match=r"expected a model of type llama, mistral, qwen2, qwen3, got 'gpt2'"):
        swap_kernels(gpt2)
    with pytest.raises(ConfigError, match="got 'Linear'"):
        swap_kernels(torch.nn.Linear(1, 1))
    ours, _ = build_pair("llama")
    with pytest.raises(ConfigError, match="already"):
        swap_kernels(ours)
