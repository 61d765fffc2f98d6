"""Activation checkpointing and compilation of blocks: the same numbers, less memory, on any ZeRO stage, and with ranks
that lack a modality."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from test_distributed_checkpoint import loader_state
from torch import nn

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.load import find_latest, load_into
from trichord.checkpoints.save import CheckpointSaver
from trichord.core.errors import ConfigError
from trichord.core.phase import current_phase, phase
from trichord.encoders.transformer import Block
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import build_engine, start_process_group
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.step import Stepper
from trichord.engine.stuck import look
from trichord.fusion.model import Trichord
from trichord.layers import compiled
from trichord.layers.blocks import block_lists
from trichord.layers.recompute import Recompute, recompute_blocks

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

    def flops(mode: Recompute) -> int:
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


def prepared_stepper(config: EngineConfig):
    facts, device = start_process_group(config.timeout_s)
    model = tiny.build_tiny()
    names = list(model.state_dict())
    prepare_blocks(model, config)
    assert list(model.state_dict()) == names
    count = tiny.ROWS // (2 * facts.world_size)
    engine = build_engine(model, config, micro_rows=2, grad_accum_steps=count)
    layout = SlotLayout(2 * tiny.MAX_SAMPLES, count)
    return facts, engine, Stepper(engine, tiny.OBJECTIVES, device=device, layout=layout, max_grad_norm=1.0)


def histories(cases: list[dict], steps: int) -> list:
    out = []
    for case in cases:
        config = EngineConfig.model_validate(PLAIN | case)
        facts, engine, stepper = prepared_stepper(config)
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


FIRST, LAST = 3, 26  # steps in between are compiled, those before and behind are not


def switched_history(folder: str, case: dict, backend: str) -> tuple[list, list[int], int]:
    """Losses of a run that is stopped twice, compiled only in the middle; graphs after each of those steps; breaks."""
    from torch._dynamo.utils import counters

    compiled.BACKEND = backend
    history, graphs = [], []
    for steps, on in ((range(FIRST), False), (range(FIRST, LAST - 3), True), (range(LAST - 3, LAST), False)):
        config = EngineConfig.model_validate(PLAIN | case | {"compile": on, "timeout_s": 800.0})
        facts, engine, stepper = prepared_stepper(config)
        if steps.start:
            latest = find_latest(Path(folder))
            assert latest is not None
            load_into(engine, latest)
        for step in steps:
            history += tiny.train_steps(facts, engine, stepper, config, 2, range(step, step + 1))
            graphs += [counters["stats"]["unique_graphs"]] if on else []
        saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
        saver.begin(engine, steps.stop, {"progress": {}}, loader_state(steps.stop))
        assert saver.finish()
        engine.destroy()
    return history, graphs, sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ({"zero_stage": 3}, "inductor"),
        # Graphs and their backward as with inductor, without the minutes of a C++ compiler.
        ({"zero_stage": 2, "activation_checkpointing": "selective"}, "aot_eager"),
    ],
    ids=["stage 3", "stage 2, selective"],
)
def test_a_run_that_is_compiled_for_a_while_goes_on_alike(tmp_path, case, backend):
    plain = run_ranks(2, histories, [case], LAST)
    by_rank = run_ranks(2, switched_history, str(tmp_path), case, backend, timeout_s=800)
    for (expected,), (found, graphs, breaks) in zip(plain, by_rank, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        print("graphs after each step:", graphs)
        assert breaks == 0
        # Items come in other numbers and lengths in every step: with one of them baked in, each step would compile.
        assert 0 < graphs[-1] == graphs[len(graphs) // 2] <= 16


def compile_one(monkeypatch, backend) -> nn.Module:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    block = nn.Linear(2, 2)
    compiled.compile_blocks([block])
    return block


def test_full_recomputation_around_a_compiled_block_of_any_shape(monkeypatch):
    from torch._dynamo.backends.registry import lookup_backend

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch.manual_seed(0)
    plain = Block(8, 2)
    block = copy.deepcopy(plain)
    compiled.compile_blocks([block], "full")
    for items, length in ((2, 3), (4, 7), (5, 6), (3, 11)):
        x, mask = torch.randn(items, length, 8), torch.ones(items, 1, 1, length, dtype=torch.bool)
        kept: list[list[int]] = [[], []]
        for one, sizes in zip((plain, block), kept, strict=True):
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
                loss = one(x, mask).square().sum()
            loss.backward()
        assert sum(kept[1]) < sum(kept[0])
        for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(graphs) <= 2, "a shape is baked in"  # the second where two sizes were equal by chance


def test_a_rank_that_compiles_says_so(monkeypatch):
    seen = []

    def backend(graph, inputs):
        seen.append(look(0, 0))
        return graph.forward

    with phase("forward"):
        compile_one(monkeypatch, backend)(torch.ones(3, 2))
        assert [sight.phase.split()[0] for sight in seen] == ["compile,"]
        assert str(current_phase()) == "forward"


def test_a_block_that_does_not_compile_is_one_message(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("C++ compile error\n\nOutput:\nx.cpp:1:10: fatal error: Python.h: No such file")

    block = compile_one(monkeypatch, backend)
    with pytest.raises(
        ConfigError, match=r"engine\.compile: .* on a Linear \(x\.cpp.*Python\.h.*engine\.compile=false"
    ):
        block(torch.ones(3, 2))


def test_no_compiler_is_one_message_before_training():
    from torch._inductor import config

    message = r"engine\.compile: .*/no/such/g\+\+.*install a C\+\+ compiler"
    with config.patch({"cpp.cxx": ("/no/such/g++",)}), pytest.raises(ConfigError, match=message):
        prepare_blocks(tiny.build_tiny(), EngineConfig.model_validate(PLAIN | {"compile": True}))
