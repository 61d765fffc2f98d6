"""Predicted activations against what autograd really keeps, for six kinds of runs, on batches the plan never saw."""

import planned_runs
import pytest
import torch
from planned_runs import KINDS, SPECIAL, build, build_shapes, config_of, drawn_batches, typical_batches

from trichord.fusion.model import build_model
from trichord.planning.trace import ShapeModel

LIMIT = 0.10
BATCHES = 2


def measured_bytes(config, model, batches, autocast=False) -> float:
    """Memory that autograd keeps for the backward pass, parameters left out, a mean over batches."""
    engine = config.engine
    model.train()
    model.enable_activation_checkpointing(engine.activation_checkpointing, engine.checkpoint_every_blocks)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0
    for batch in batches:
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model(batch)
        total += sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
    return total / len(batches)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_predicted(kind):
    config = config_of(kind, micro_rows=4)
    torch.manual_seed(0)
    measured = measured_bytes(config, build(config), drawn_batches(config, BATCHES, seed=1))
    shapes = ShapeModel(build_shapes(config), recompute=config.engine.activation_checkpointing)
    typical = typical_batches(config, BATCHES)
    predicted = sum(shapes.trace(batch, "reference").total for batch in typical) / len(typical)
    print(f"{kind}: measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f}")
    assert predicted == pytest.approx(measured, rel=LIMIT)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_activations_in_half_precision(precision):
    """The same batch here: what is left to differ is the precision alone."""
    config = config_of("all")
    torch.manual_seed(0)
    model = build(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    batches = typical_batches(config, 1)
    measured = measured_bytes(config, model, batches, autocast=precision == "autocast")
    shapes = ShapeModel(build_shapes(config), half=precision == "bf16")
    predicted = shapes.trace(batches[0], "reference", autocast=precision == "autocast").total
    assert predicted == pytest.approx(measured, rel=0.01)


def test_selective_recomputation_keeps_products(monkeypatch):
    """No hook of autograd sees what it keeps: here it is compared with what must be kept, by kind of block."""
    config = config_of("trunk")
    batch = typical_batches(config, 1)[0]
    saved = {
        mode: ShapeModel(build_shapes(config), recompute=mode).trace(batch, "triton").total
        for mode in ("none", "selective", "full")
    }
    tokens, trunk = batch.input_ids.shape[0], config.fusion.trunk
    heads = (2 * trunk.num_heads + 2 * trunk.num_kv_heads) * trunk.resolved_head_dim  # q, k, v and what attention gives
    products = heads + 2 * trunk.hidden_size + 2 * trunk.intermediate_size  # out, down; gate, up
    kept = 4 * tokens * trunk.num_layers * (products + trunk.num_heads)  # and the log-sum-exp
    assert saved["selective"] - saved["full"] == pytest.approx(kept, rel=0.01)
    assert saved["full"] < saved["selective"] < saved["none"]


def block_bytes(kind: str, tower: str, batch) -> list[int]:
    trace = ShapeModel(build_shapes(config_of(kind))).trace(batch, "triton")
    return [size for name, size in trace.blocks.items() if name.startswith(tower)]


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
