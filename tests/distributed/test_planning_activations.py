"""Predicted activations against what autograd really keeps, for six kinds of runs, on batches the plan never saw."""

from contextlib import nullcontext

import planned_runs
import pytest
import torch
import torch.distributed as dist
from planned_measures import kept_bytes
from planned_runs import KINDS, SPECIAL, build, build_shapes, config_of, drawn_batches, typical_batches
from ranks import run_ranks

from trichord.engine.build import start_process_group
from trichord.fusion.model import build_model
from trichord.layers.sequence import SequenceGroup
from trichord.planning import trace
from trichord.planning.trace import ShapeModel

LIMIT = 0.10
BATCHES = 2


def trace_of(config, shapes, batch, rule, **more):
    engine = config.engine
    options = {"recompute": engine.activation_checkpointing, "every": engine.checkpoint_every_blocks}
    return shapes.trace(batch, rule, **options, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_predicted(kind):
    config = config_of(kind, micro_rows=4)
    torch.manual_seed(0)
    measured = kept_bytes(config, build(config), drawn_batches(config, BATCHES, seed=1))
    shapes = ShapeModel(build_shapes(config))
    typical = typical_batches(config, BATCHES)
    predicted = sum(trace_of(config, shapes, batch, "reference").total for batch in typical) / len(typical)
    print(f"{kind}: measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f}")
    assert predicted == pytest.approx(measured, rel=LIMIT)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_activations_in_half_precision(precision):
    """The same batch here: what is left to differ is the precision alone."""
    config = config_of("all")
    torch.manual_seed(0)
    model = build(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    batches = typical_batches(config, 1)
    measured = kept_bytes(config, model, batches, autocast=precision == "autocast")
    shapes = ShapeModel(build_shapes(config), half=precision == "bf16")
    predicted = shapes.trace(batches[0], "reference", autocast=precision == "autocast").total
    assert predicted == pytest.approx(measured, rel=0.01)


def kept_by_a_rank(config) -> tuple[float, float]:
    """Entry point of a rank: what it keeps of batches that all of them share, and what is predicted of that."""
    start_process_group(60.0)
    torch.manual_seed(0)
    size = dist.get_world_size()
    model = build(config)
    model.sequence = SequenceGroup(dist.group.WORLD)
    batches = [batch.shared(dist.get_rank(), size) for batch in drawn_batches(config, BATCHES, seed=1)]
    measured = kept_bytes(config, model, batches)
    shapes, typical = ShapeModel(build_shapes(config)), typical_batches(config, BATCHES)
    return measured, sum(shapes.trace(batch, "reference", shared=size).total for batch in typical) / BATCHES


@pytest.mark.distributed
def test_activations_of_ranks_that_share_rows_are_predicted():
    """What a plan says is of the rank with the most."""
    config = config_of("all", micro_rows=4, sequence_parallel=2)
    found = run_ranks(2, kept_by_a_rank, config)
    measured, predicted = max(each for each, _ in found), found[0][1]
    print(f"all, shared by 2: measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f}")
    assert predicted == pytest.approx(measured, rel=LIMIT)


@pytest.mark.parametrize(
    ("kind", "mode", "every"), [("all", "none", 1), ("frozen", "selective", 1), ("audio", "full", 2)]
)
def test_blocks_that_are_alike_are_run_once_and_count_as_often_as_they_are(kind, mode, every, monkeypatch):
    config = config_of(kind)
    batch, shapes = typical_batches(config, 1)[0], ShapeModel(build_shapes(config))
    shapes.trace(batch, "reference")  # fixed numbers are made once
    short = shapes.trace(batch, "reference", recompute=mode, every=every)
    run = []
    for layer in shapes.model.trunk.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: run.append(1))
    assert shapes.trace(batch, "reference", recompute=mode, every=every) == short
    assert len(run) == 2 * every < len(shapes.model.trunk.model.layers) + every
    monkeypatch.setattr(trace, "one_of_alike", lambda *_: nullcontext())
    assert shapes.trace(batch, "reference", recompute=mode, every=every) == short


def test_selective_recomputation_keeps_products(monkeypatch):
    """No hook of autograd sees what it keeps: here it is compared with what must be kept, by kind of block."""
    config = config_of("trunk")
    batch = typical_batches(config, 1)[0]
    shapes = ShapeModel(build_shapes(config))
    saved = {mode: shapes.trace(batch, "triton", recompute=mode).total for mode in ("none", "selective", "full")}
    tokens, trunk = batch.input_ids.shape[0], config.fusion.trunk
    heads = (2 * trunk.num_heads + 2 * trunk.num_kv_heads) * trunk.resolved_head_dim  # q, k, v and what attention gives
    products = heads + 2 * trunk.hidden_size + 2 * trunk.intermediate_size  # out, down; gate, up
    kept = 4 * tokens * trunk.num_layers * (products + trunk.num_heads)  # and the log-sum-exp
    assert saved["selective"] - saved["full"] == pytest.approx(kept, rel=0.01)
    assert saved["full"] < saved["selective"] < saved["none"]


def block_bytes(kind: str, tower: str, batch) -> list[int]:
    found = ShapeModel(build_shapes(config_of(kind))).trace(batch, "triton")
    return [size for name, size in found.blocks.items() if name.startswith(tower)]


@pytest.mark.parametrize(("kind", "qk_norm"), [("trunk", False), ("vision", True)])
def test_a_decoder_layer_keeps_what_the_ops_document(kind, qk_norm):
    """docs/guides/planning.md, per token: two norms keep their inputs, projections theirs, rotation q and k where they
    are normed, attention q, k, v, its result and the log-sum-exp; the MLP gate, its SiLU, up and their product."""
    config = config_of(kind)
    batch = typical_batches(config, 1)[0]
    trunk, tokens = config.fusion.trunk, batch.input_ids.shape[0]
    width, inner = trunk.hidden_size, trunk.intermediate_size
    q, kv = trunk.num_heads * trunk.resolved_head_dim, trunk.num_kv_heads * trunk.resolved_head_dim
    kept = 4 * width + (2 * q + 2 * kv) + trunk.num_heads + 4 * inner
    if qk_norm:
        kept += q + kv
    layers = block_bytes(kind, "trunk", batch)
    assert len(layers) == trunk.num_layers
    # The first layer also counts what all share: positions, boundaries.
    assert layers[1] == pytest.approx(4 * tokens * kept, rel=0.01)


def test_a_tower_block_keeps_what_torch_documents():
    """docs/guides/planning.md, per token of width D and with an MLP of 4 D: two norms their inputs and two statistics,
    projections their inputs, attention q, k, v (one tensor), its result and the log-sum-exp, GELU its input."""
    config = config_of("towers")
    batch = typical_batches(config, 1)[0]
    options = planned_runs.VISION["options"]
    tokens, width = batch.num_images * 17, options["embed_dim"]  # 16 patches and the class token
    kept = 2 * width + 2 * 2 + width + 3 * width + width + options["num_heads"] + width + 8 * width
    assert block_bytes("towers", "vision", batch)[1] == pytest.approx(4 * tokens * kept, rel=0.01)


def test_the_trace_needs_no_memory_for_weights():
    config = config_of("trunk")
    huge = config.fusion.trunk.model_copy(update={"hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64})
    fusion = config.fusion.model_copy(update={"trunk": huge})
    with torch.device("meta"):
        model = build_model(config.encoders, fusion, config.objectives, config.samples, config.layers, 128_000, SPECIAL)
    assert sum(p.numel() for p in model.parameters()) > 5e9
    assert ShapeModel(model, half=True).trace(typical_batches(config, 1)[0], "triton").total > 2**28
