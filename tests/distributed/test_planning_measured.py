"""Predicted model states and wire bytes against what two ranks really hold and send, for six kinds of runs."""

import math

import pytest
import torch
from planned_measures import measure_step
from planned_runs import KINDS, build, build_shapes, config_of, typical_batches
from ranks import run_ranks

from trichord.planning.comms import Collective, Features, collectives
from trichord.planning.memory import model_states
from trichord.planning.sharing import exchanges
from trichord.planning.trace import ShapeModel
from trichord.planning.zero import DEFAULTS, Zero, parameters_of

pytestmark = pytest.mark.distributed

STATES_LIMIT, WIRE_LIMIT = 0.02, 0.05
# As in a model much larger than DeepSpeed's limits: what is gathered is let go of, and few weights are small.
OF_A_LARGE_MODEL = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


# What is tried beside them, by kind of run and number of the case. hpZ comes last: DeepSpeed keeps its groups for all
# later engines of a process.
MORE = {
    "towers": {1: {"optimizer": "adamw_8bit"}},
    "trunk": {0: {"optimizer": "adamw_8bit"}, 2: {"optimizer": "muon"}},
    "vision": {3: {"optimizer": "adamw_8bit"}, 4: {"hpz_ranks": 2}},
    "audio": {1: {"optimizer": "muon"}, 4: {"optimizer": "muon"}},
    "all": {1: {"optimizer": "muon"}, 2: {"sequence_parallel": 2}, 3: {"optimizer": "muon"}, 4: {"hpz_ranks": 2}},
    "frozen": {2: {"sequence_parallel": 2}, 4: {"hpz_ranks": 2}},
}


def cases_of(kind: str) -> list[tuple[int, int, dict, dict]]:
    """(stage, accumulation, zero_optimization overlay, engine keys): every stage; each accumulation with half of the
    kinds."""
    odd = list(KINDS).index(kind) % 2
    one, four = (1, 4) if odd else (4, 1)
    cases = [(0, one, {}), (1, four, {}), (2, one, {}), (3, four, {}), (3, one, OF_A_LARGE_MODEL)]
    return [(*case, MORE[kind].get(number, {})) for number, case in enumerate(cases)]


def features_of(config, accumulation: int) -> Features | None:
    if config.objectives.contrastive is None:
        return None
    samples = config.batches.micro_rows * config.batches.max_samples_per_row
    slots = math.ceil(samples / config.engine.sequence_parallel) * accumulation
    towers = (config.encoders.vision, config.encoders.audio, config.encoders.text)
    return Features(slots, config.objectives.contrastive.embed_dim, sum(tower is not None for tower in towers))


def compare(kind: str, cases: list, precision: str) -> list[dict]:
    """Entry point of a rank: per case, measured and predicted."""
    found = []
    for stage, accumulation, overlay, more in cases:
        engine = {"zero_stage": stage, "precision": precision, **more}
        engine |= {"deepspeed": {"zero_optimization": overlay}} if overlay else {}
        config = config_of(kind, micro_rows=4 // accumulation, row_tokens=96, **engine)
        torch.manual_seed(0)
        model = build(config)
        parameters = parameters_of(model)
        zero = Zero.of(config.engine, 2, sum(p.numel for p in parameters if p.trainable))
        sent = collectives(parameters, zero, accumulation, features_of(config, accumulation))
        sent += shared_rows(config, accumulation)
        predicted = {op: sum(c.bytes for c in sent if c.op == op) for op in {c.op for c in sent}}
        states = model_states(parameters, config.engine, zero, rank=0)
        measured = measure_step(config, model, typical_batches(config, accumulation), zero.bucket)
        found.append(
            {
                "case": f"{kind} z{stage} x{accumulation} {precision}{' large' if overlay else ''} {more or ''}",
                "states": (measured.states, states.held),
                "buckets": measured.buckets,
                "buckets_predicted": states.backward if stage == 3 else 0,
                "wire": {op: (measured.wire.get(op, 0), size) for op, size in predicted.items()},
                "in_node": (measured.in_node, sum(c.bytes for c in sent if c.op == "all_gather" and c.ranks)),
                "total": (sum(measured.wire.values()), sum(predicted.values())),
            }
        )
        del model
    return found


def shared_rows(config, accumulation: int) -> list[Collective]:
    if config.engine.sequence_parallel == 1:
        return []
    shapes, found = ShapeModel(build_shapes(config)), []
    for batch in typical_batches(config, accumulation):
        autocast = config.engine.precision == "autocast_bf16"
        trace = shapes.trace(batch, "reference", autocast=autocast, shared=config.engine.sequence_parallel)
        found += exchanges(trace.sent, trace.messages, config.engine, 1)
    return found


def check(found: list[dict]) -> None:
    for case in found:
        print(case["case"], "states and wire, (measured, predicted) bytes:", case["states"], case["total"])
    for case in found:
        measured, predicted = case["states"]
        assert predicted == pytest.approx(measured, rel=STATES_LIMIT), case
        for measured, predicted in (*case["wire"].values(), case["total"]):
            assert predicted == pytest.approx(measured, rel=WIRE_LIMIT), case
        assert case["buckets"] == case["buckets_predicted"], case
        measured, predicted = case["in_node"]
        assert predicted == pytest.approx(measured, rel=WIRE_LIMIT), case


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_wire_bytes_are_predicted(kind):
    check(run_ranks(2, compare, kind, cases_of(kind), "fp32", timeout_s=280)[0])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "autocast_bf16"])
def test_states_and_wire_bytes_in_half_precision(precision):
    more = {"optimizer": "muon"} if precision == "bf16" else {"sequence_parallel": 2}
    cases = [(1, 4, {}, more), (2, 1, {}, {}), (3, 4, OF_A_LARGE_MODEL, more)]
    check(run_ranks(2, compare, "all", cases, precision, timeout_s=280)[0])


def test_the_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {
        "stage3_max_live_parameters": "max_live_parameters",
        "stage3_max_reuse_distance": "max_reuse_distance",
        "stage3_prefetch_bucket_size": "prefetch_bucket_size",
        "stage3_param_persistence_threshold": "param_persistence_threshold",
    }
    theirs = DeepSpeedZeroConfig(stage=1)
    for key, value in DEFAULTS.items():
        if key != "overlap_comm":  # none there either: true at stage 3 only, which is set after validation
            assert getattr(theirs, names.get(key, key)) == value, key
