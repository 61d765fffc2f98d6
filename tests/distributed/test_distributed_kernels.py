"""Swapped Hugging Face models under ZeRO-3: ops that read weights see them gathered, tied and untied heads alike."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 4
VOCABULARY = 40


def build_swapped(family: str, tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from trichord.layers.swap import swap_kernels

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )
    return swap_kernels(model_class(config)).train()


def train_stages(family: str, tied: bool) -> dict[int, list[float]]:
    """Losses of a few steps at stages 0 and 3; each rank has its own batch, and rank 1 fewer labels."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    rank = dist.get_rank()
    losses = {}
    for stage in (0, 3):
        model = build_swapped(family, tied)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        taken = losses[stage] = []
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(10 * step + rank)
            ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
            labels = ids.clone()
            labels[:, : 4 * rank] = -100
            loss = engine(input_ids=ids, labels=labels).loss
            engine.backward(loss)
            engine.step()
            dist.all_reduce(total := loss.detach().clone())
            taken.append(total.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stage_three_gives_the_losses_of_stage_zero(family: str, tied: bool) -> None:
    by_rank = run_ranks(2, train_stages, family, tied)
    assert by_rank[0] == by_rank[1]
    losses = by_rank[0]
    assert losses[0][-1] != losses[0][0]
    assert losses[3] == pytest.approx(losses[0], rel=1e-6)
