"""Activation checkpointing and compilation of blocks: the same numbers, less memory, on any ZeRO stage, and with ranks
that lack a modality."""

import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn

from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import build_engine, start_process_group
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.step import Stepper
from trichord.fusion.model import Trichord
from trichord.layers import compiled
from trichord.layers.blocks import block_lists
from trichord.layers.recompute import recompute_blocks

pytestmark = pytest.mark.distributed

PLAIN = {"zero_stage": 0, "precision": "fp32", "timeout_s": 60.0, "lr": 5e-3, "zero_init": False}


def gradients(model: Trichord) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    out = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tiny.micro_batches(1, 0, 1, 4)[0])
    loss = out.next_token_loss_sum + out.image_embeds.square().sum() + out.placeholder
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_bit_and_keeps_less(mode):
    loss, expected, kept = gradients(tiny.build_tiny())
    sizes = [kept]
    for every in (2, 1):
        model = tiny.build_tiny()
        names = [name for name, _ in model.named_parameters()]
        model.enable_activation_checkpointing(mode, every)
        assert [name for name, _ in model.named_parameters()] == names
        again, found, kept = gradients(model)
        assert torch.equal(again, loss)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        sizes.append(kept)
    if mode == "full":  # what selective keeps for itself is not seen by these hooks
        print("bytes kept; recomputed: no block, every second, all:", sizes)
        assert sizes[2] < sizes[1] < sizes[0]


def test_selective_computes_no_matrix_product_twice():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(mode: str) -> int:
        model = tiny.build_tiny()
        model.enable_activation_checkpointing(mode)
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        return counter.get_total_flops()

    assert flops("selective") == flops("none") < flops("full")


def test_every_tower_and_the_trunk_have_blocks():
    model = tiny.build_tiny()
    assert [len(blocks) for blocks in block_lists(model)] == [1, 1, 2]  # vision, audio, trunk; the text tower is a mean
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(5)])
    recompute_blocks(list(blocks), "full", 2)
    assert [type(block) is nn.Sequential for block in blocks] == [False, True, False, True, False]


def histories(cases: list[dict], steps: int) -> list:
    compiled.BACKEND = "aot_eager"  # graphs and their backward as with inductor, without minutes of a C++ compiler
    out = []
    for case in cases:
        config = EngineConfig.model_validate(PLAIN | case)
        facts, device = start_process_group(60)
        model = tiny.build_tiny()
        prepare_blocks(model, config)
        count = tiny.ROWS // (2 * facts.world_size)
        engine = build_engine(model, config, micro_rows=2, grad_accum_steps=count)
        layout = SlotLayout(2 * tiny.MAX_SAMPLES, count)
        stepper = Stepper(engine, tiny.OBJECTIVES, device=device, layout=layout, max_grad_norm=1.0)
        out.append(tiny.train_steps(facts, engine, stepper, config, 2, range(steps)))
        engine.destroy()
    return out


def recomputed(mode: str) -> dict:
    return {"zero_stage": 3, "activation_checkpointing": mode}


def test_ranks_without_images_recompute_alike():
    by_rank = run_ranks(2, histories, [recomputed("none"), recomputed("full")], 3)
    # In processes of their own: DeepSpeed's linear, which stage 3 puts in torch's place, stays there for good.
    selective_by_rank = run_ranks(2, histories, [recomputed("selective")], 3)
    for (none, full), (selective,) in zip(by_rank, selective_by_rank, strict=True):
        assert full == none
        for ours, theirs in zip(selective, none, strict=True):  # DeepSpeed gathers a block as one, and sums otherwise
            assert ours == pytest.approx(theirs, rel=1e-6)


def compiled_histories(cases: list[dict], steps: int) -> tuple[list, int, int]:
    from torch._dynamo.utils import counters

    out = histories(cases, steps)
    return out, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case",
    [{"zero_stage": 3}, {"zero_stage": 2, "activation_checkpointing": "selective"}],
    ids=["stage 3", "stage 2, selective"],
)
def test_compiled_blocks_give_the_same_losses(case):
    plain = run_ranks(2, histories, [case], 3)
    compiled_by_rank = run_ranks(
        2, compiled_histories, [case | {"compile": True, "timeout_s": 600.0}], 3, timeout_s=800
    )
    for (expected,), ((found,), graphs, breaks) in zip(plain, compiled_by_rank, strict=True):
        assert graphs > 0, "nothing was compiled"
        assert breaks == 0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
