"""The contrastive loss' Triton kernels, run by Triton's interpreter on the CPU (see interpreted_rms_norm.py)."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from contrastive_loss_rule import MODES, judge_loss, messy_slots, operands, run
from kernel_rule import LAYOUTS, in_layout

from trichord_kernels import contrastive_loss, reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops import contrastive_loss as op
from trichord_kernels.tables import contrastive_loss as tables

LEAST_CASES = 73
# 24 features are held whole (32 in the interpreter's table), 40 are read in blocks, the last one ragged.
CASES = [
    (torch.float32, 24, True),
    (torch.float32, 40, False),
    (torch.float16, 24, False),
    (torch.float16, 40, True),
]


@pytest.fixture(autouse=True)
def _one_program_per_row_block(monkeypatch) -> None:
    """So that a program sees several tiles; a case of its own has them shared out."""
    torch.manual_seed(0)
    monkeypatch.setattr(tables, "PROGRAMS", 1)


def _judge(tensors, record_property=None, **options):
    ours = run(contrastive_loss, tensors, **options)
    ratios = judge_loss(ours, tensors, **options)
    if record_property:
        record_property("worst_error_ratio", max(r.ratio for r in ratios))
    return ours


def _assert_same_bits(tensors, ours, **options) -> None:
    again = run(contrastive_loss, tensors, **options)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the second run gave other bits"


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "size", "is_messy"), CASES)
def test_error_rule(mode, dtype, size, is_messy, record_property) -> None:
    num_targets = 45 if mode == "symmetric" else 39
    tensors = operands(45, num_targets, size, dtype)
    slots = messy_slots(tensors) if is_messy else {}
    ours = _judge(tensors, record_property, **MODES[mode], **slots)
    if is_messy:
        assert not ours["grad_queries"][~slots["query_valid"]].any()
        assert not ours["grad_targets"][~slots["target_valid"]].any()


@pytest.mark.parametrize("mode", MODES)
def test_candidates_shared_out_over_programs(mode, monkeypatch, record_property) -> None:
    monkeypatch.setattr(tables, "PROGRAMS", 264)
    tensors = operands(33, 70, 24, torch.float32) if mode != "symmetric" else operands(40, 40, 24, torch.float32)
    slots = messy_slots(tensors)
    ours = _judge(tensors, record_property, **MODES[mode], **slots)
    _assert_same_bits(tensors, ours, **MODES[mode], **slots)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 8), (5, 33, 33)], ids=str)
def test_odd_shapes(mode, shape, record_property) -> None:
    num_queries, num_targets, size = shape
    if mode == "symmetric":
        num_targets = num_queries
    _judge(operands(num_queries, num_targets, size, torch.float32), record_property, **MODES[mode])


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_all_logits(offset, record_property) -> None:
    """Rows and columns not in use have logits of 0 as their features are 0: far above or below all others."""
    tensors = operands(40, 40, 24, torch.float32, scale=2.0)
    tensors["queries"][:, 0], tensors["targets"][:, 0] = 100.0, offset / 200.0
    slots = messy_slots(tensors)
    ours = _judge(tensors, record_property, **MODES["symmetric"], **slots)
    assert abs(ours["loss"]) < 40 * 10


@pytest.mark.parametrize("scale", [100.0, 0.0, -20.0])
@pytest.mark.parametrize("mode", MODES)
def test_scales(mode, scale, record_property) -> None:
    _judge(operands(20, 20, 24, torch.float32, scale=scale, bias=-10.0), record_property, **MODES[mode])


def test_sigmoid_of_far_negatives_keeps_its_digits() -> None:
    """At SigLIP's start nearly every pair is a negative of logit -10: a plain log(1 + exp(-10)) would lose 3 digits."""
    tensors = operands(33, 64, 8, torch.float32, scale=0.0, bias=-10.0)
    tensors["logit_bias"] = torch.tensor(-10.0)
    groups = {"query_groups": torch.zeros(33).long(), "target_groups": torch.ones(64).long()}
    loss = contrastive_loss(*tensors.values(), kind="sigmoid", **groups)
    assert loss.item() == pytest.approx(33 * 64 * torch.log1p(torch.exp(torch.tensor(-10.0).double())).item(), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_poisoned_surroundings(layout, record_property) -> None:
    tensors = operands(21, 21, 24, torch.float32)
    for name in ("queries", "targets"):
        tensors[name] = in_layout(tensors[name], layout)
    _judge(tensors, record_property, **MODES["symmetric"])


@pytest.mark.parametrize("mode", MODES)
def test_memory_it_did_not_write_is_never_read(mode) -> None:
    """With deterministic algorithms torch fills new memory with NaN."""
    tensors = operands(33, 33, 40, torch.float32) if mode == "symmetric" else operands(33, 20, 40, torch.float32)
    slots = messy_slots(tensors)
    want = run(contrastive_loss, tensors, **MODES[mode], **slots)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = run(contrastive_loss, tensors, **MODES[mode], **slots)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_valid_gives_zeros(mode) -> None:
    tensors = operands(5, 5, 8, torch.float32)
    none = torch.zeros(5, dtype=torch.bool)
    for valid in ({"query_valid": none}, {"target_valid": none}):
        ours = run(contrastive_loss, tensors, **MODES[mode], **valid)
        assert not any(tensor.any() for tensor in ours.values()), valid


@pytest.mark.parametrize(("num_queries", "num_targets"), [(0, 0), (0, 3), (3, 0)])
def test_no_rows_or_no_candidates(num_queries, num_targets) -> None:
    for mode in ("one_way", "sigmoid"):
        ours = run(contrastive_loss, operands(num_queries, num_targets, 8, torch.float32), **MODES[mode])
        assert ours["grad_targets"].shape == (num_targets, 8)
        assert not any(tensor.any() for tensor in ours.values())


@pytest.mark.parametrize("mode", MODES)
def test_returned_gradients_are_those_of_autograd(mode) -> None:
    tensors = operands(20, 20, 24, torch.float16)
    slots = messy_slots(tensors)
    want = run(lambda *args, **options: contrastive_loss(*args, **options) / 1.7, tensors, **MODES[mode], **slots)
    loss, grads = contrastive_loss(*tensors.values(), **MODES[mode], **slots, return_gradients=True)
    assert loss.item() == pytest.approx(1.7 * want["loss"].item(), rel=1e-6)
    assert not loss.requires_grad
    for name in tensors:
        got = getattr(grads, name)
        assert got.dtype == tensors[name].dtype
        torch.testing.assert_close(got, want[f"grad_{name}"], rtol=2e-3, atol=1e-6)
    _, without_bias = contrastive_loss(*list(operands(3, 3, 8, torch.float16).values())[:3], return_gradients=True)
    assert without_bias.logit_bias.item() == 0


@pytest.mark.parametrize("frozen", ["queries", "targets", "both"])
@pytest.mark.parametrize("mode", ["symmetric", "sigmoid"])
def test_frozen_towers(mode, frozen) -> None:
    tensors = operands(20, 20, 24, torch.float32)
    want = run(contrastive_loss, tensors, **MODES[mode])
    without = {"both": ("queries", "targets")}.get(frozen, (frozen,))
    leaves = {name: t.detach().clone().requires_grad_(name not in without) for name, t in tensors.items()}
    (1.7 * contrastive_loss(*leaves.values(), **MODES[mode])).backward()
    for name, leaf in leaves.items():
        if name in without:
            assert leaf.grad is None
        elif leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, want[f"grad_{name}"], rtol=1e-5, atol=1e-5)
    assert leaves["logit_scale"].grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_equals_no_group(mode, tmp_path) -> None:
    """The path over ranks with the kernels; several ranks run in tests/distributed with the twin."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        tensors = operands(20, 20, 24, torch.float32)
        slots = messy_slots(tensors)
        want = run(contrastive_loss, tensors, **MODES[mode], **slots)
        got = run(contrastive_loss, tensors, **MODES[mode], **slots, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_scalars_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    tensors = operands(5, 5, 8, torch.float32)
    scale = torch.nn.Parameter(tensors["logit_scale"].clone())
    queries = tensors["queries"].requires_grad_()
    loss = contrastive_loss(queries, tensors["targets"], scale)
    scale.data = torch.empty(0)
    scale.data = tensors["logit_scale"].clone()
    loss.backward()
    want = run(contrastive_loss, tensors, **MODES["symmetric"])
    torch.testing.assert_close(1.7 * queries.grad, want["grad_queries"])


def _op_arguments(mode, with_bias=True):
    tensors = operands(6, 6, 24, torch.float32)
    tensors["queries"] = tensors["queries"].t().contiguous().t()
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    ids = torch.tensor([0, 1, -1, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 1, 2, -2, 3, 5], dtype=torch.int32)
    leaves = leaves if with_bias else [*leaves[:3], None]
    return (*leaves, *ids, MODES[mode]["kind"], MODES[mode]["symmetric"])


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode) -> None:
    arguments = _op_arguments(mode, with_bias=mode != "one_way")
    torch.library.opcheck(op.contrastive_loss_forward, arguments)
    *tensors, kind, symmetric = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    loss, *stats = op.contrastive_loss_forward(*tensors, kind, symmetric)
    wanted = {"symmetric": (True, True), "one_way": (True, False), "sigmoid": (False, True)}[mode]
    torch.library.opcheck(op.contrastive_loss_backward, (loss, *tensors, *stats, kind, symmetric, *wanted))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def step(queries, targets, scale, groups, valid):
        slots = {"query_groups": groups, "target_groups": groups, "query_valid": valid, "target_valid": valid}
        return contrastive_loss(queries * 2, targets, scale, **slots) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        tensors = list(operands(length, length, 24, torch.float32).values())[:3]
        slots = torch.arange(length) % 4, torch.arange(length) != 2
        eager, graph = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        want, got = step(*eager, *slots), compiled(*graph, *slots)
        want.backward()
        got.backward()
        torch.testing.assert_close(want, got)
        for a, b in zip(eager, graph):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def test_autocast_computes_in_float32() -> None:
    tensors = operands(9, 9, 24, torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(*tensors.values())
    wide = [tensor.float() for tensor in tensors.values()]
    assert torch.equal(loss, contrastive_loss(*wide))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": torch.zeros(2, 8).double(), "targets": torch.zeros(2, 8).double()}, ["float32, bf", "float64"]),
        ({"logit_scale": torch.zeros((), device="meta")}, ["one device", "cpu", "meta"]),
    ],
)
def test_refuses_what_it_does_not_cover(change, words) -> None:
    with pytest.raises(ValueError) as caught:
        contrastive_loss(**(operands(2, 2, 8, torch.float32) | change))
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_twin_and_the_kernels_refuse_alike() -> None:
    for function in (contrastive_loss, reference.contrastive_loss):
        with pytest.raises(ValueError, match="expected as many targets"):
            function(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(()))
