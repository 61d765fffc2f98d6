"""The attention kernels, run by Triton's interpreter on the CPU against the definition (attention_rule.py).

Run by test_kernels_interpreter.py in a process of its own. float32 and float16 only: the interpreter computes bfloat16
wrongly. Its tiles are 32 x 32, so that 65 to 97 tokens are several tiles with a ragged end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from attention_rule import Case, judge_attention, visible
from kernel_rule import in_layout

from trichord_kernels import attention
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.errors import KernelError
from trichord_kernels.ops import attention as op
from trichord_kernels.ops import attention_backward, attention_forward, attention_tiles
from trichord_kernels.ops.attention_tiles import split_head_dim

LEAST_CASES = 60
NAN = float("nan")

KINDS = {
    "causal": Case((33, 64)),
    "causal_spans": Case((20, 57), spans=((5, 10), (10, 18), (30, 75))),
    "prefix_lm": Case((55, 17), spans=((0, 45), (55, 60))),
    "window": Case((70, 5), window=20),
    "window_of_one": Case((40,), window=1),
    "window_spans": Case((97,), window=9, spans=((20, 80),)),
    "window_both_sides": Case((70, 5), window=20, causal=False),
    "window_both_sides_spans": Case((75,), window=7, causal=False, spans=((2, 60), (60, 64))),
    "whole_segments": Case((5, 57), causal=False),
    "cross": Case((10, 33), (65, 20), causal=False),
    "cross_causal": Case((20, 40, 5), (65, 20, 5)),
    "softcap": Case((33, 40), softcap=2.0),
    "softcap_window_spans": Case((73,), window=9, spans=((20, 60),), softcap=30.0),
    "used_keys": Case((40, 10, 4), used=(13, 0, 99)),
    "used_keys_window": Case((70,), used=(30,), window=11),
    "used_keys_cross": Case((40, 10, 20), (50, 40, 7), used=(23, 0, 7)),
}
SEGMENTS = {
    "one_token": Case((1,)),
    "tokens": Case((1, 1, 2)),
    "empty_first": Case((0, 0, 33)),
    "empty_middle": Case((30, 0, 0, 35)),
    "empty_last": Case((35, 0), slack=3),
    "all_empty": Case((0, 0), slack=40),
    "tile_ends": Case((32, 64)),
    "no_keys": Case((33, 8, 0, 5), (0, 8, 16, 0), causal=False),
    "no_queries": Case((0, 0), (33, 8), causal=False),
}
HEADS = {
    "one_to_one": Case((50,), heads=2, kv_heads=2),
    "four_to_one": Case((20, 25), heads=8, kv_heads=2),
    "three_to_one": Case((45,), heads=3, kv_heads=1),
    **{f"head_dim_{size}": Case((40,), heads=1, head_dim=size) for size in (1, 8, 41, 64, 72, 80, 96, 100, 128, 256)},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _hold(case: Case, record_property, tensors=None, poison=None, runs=1) -> None:
    ratios = judge_attention(attention, case, tensors, poison, runs)
    record_property("worst_error_ratio", max(r.ratio for r in ratios))


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("kind", KINDS)
def test_mask_kinds(kind, record_property) -> None:
    """Everything that may not be read holds NaN, and so do the rows behind the last segment."""
    _hold(replace(KINDS[kind], slack=5), record_property, poison=NAN)


@pytest.mark.parametrize("kind", ["causal_spans", "window", "cross_causal", "softcap", "used_keys"])
def test_mask_kinds_in_float16(kind, record_property) -> None:
    _hold(replace(KINDS[kind], slack=5, dtype=torch.float16), record_property, poison=float("inf"), runs=2)


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(name, record_property) -> None:
    _hold(SEGMENTS[name], record_property, poison=NAN)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, record_property) -> None:
    _hold(HEADS[name], record_property)


def test_more_segments_than_one_round_of_the_search(monkeypatch, record_property) -> None:
    monkeypatch.setattr(attention_tiles, "_SEARCH_CHUNK", tl.constexpr(4))
    _hold(Case((3, 0, 2, 5, 0, 0, 1, 4, 2, 0, 0, 3, 1), heads=1, slack=2), record_property, poison=NAN)


def test_scores_with_a_large_common_offset(record_property) -> None:
    case = Case((65,))
    tensors = case.tensors()
    tensors["q"][..., 0] = 200.0
    tensors["k"][..., 0] = 200.0  # adds 1e4 to every score
    _hold(case, record_property, tensors)


@pytest.mark.parametrize(
    "layout", ["heads_first", "heads_first_slice", "last_axis_strided", "odd_rows", "unaligned", "expanded"]
)
@pytest.mark.parametrize("head_dim", [16, 12])
def test_memory_layouts(layout, head_dim, record_property) -> None:
    case = Case((30, 20), head_dim=head_dim)
    tensors = {name: _laid_out(t, layout) for name, t in case.tensors().items()}
    _hold(case, record_property, tensors)


def _laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    tokens, heads, width = t.shape
    if layout == "heads_first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "heads_first_slice":  # a batch of 1 of a longer cache
        cache = t.new_full((heads, tokens + 9, width), NAN)
        cache[:, 4:-5] = t.transpose(0, 1)
        return cache[:, 4:-5].transpose(0, 1)
    if layout == "last_axis_strided":
        return t.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "expanded":
        return t[:1].expand(tokens, heads, width)
    rows = in_layout(t.reshape(tokens, heads * width), {"odd_rows": "odd_row_stride"}.get(layout, layout))
    return rows.unflatten(1, (heads, width))


def test_incoming_gradient_of_stride_0(record_property) -> None:
    case = Case((30, 20))
    tensors = case.tensors()
    tensors["grad"] = torch.ones(()).expand(tensors["grad"].shape)  # what .sum().backward() sends
    _hold(case, record_property, tensors)


def test_keys_before_and_behind_the_segments(record_property) -> None:
    """cu_seqlens that begin above 0: the rows in front count as slack."""
    inner = Case((20, 24), slack=6)
    outer = inner.tensors()
    bounds = torch.tensor([7, 27, 51], dtype=torch.int32)
    q, k, v, grad = (torch.cat([t.new_full((7, *t.shape[1:]), NAN), t]) for t in outer.values())
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, bounds, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad)
    want_leaves = [outer[name].requires_grad_() for name in ("q", "k", "v")]
    want, want_lse = attention(*want_leaves, bounds - 7, return_lse=True)
    want_grads = torch.autograd.grad(want, want_leaves, outer["grad"])
    assert torch.equal(lse[:, 7:], want_lse)
    assert (lse[:, :7] == float("-inf")).all()
    for ours, inside in zip((out, *grads), (want, *want_grads)):
        assert torch.equal(ours[7:], inside)
        assert not ours[:7].any()


@pytest.mark.parametrize("kind", ["causal", "window_spans", "whole_segments", "cross_causal", "used_keys"])
def test_visits_no_tile_that_no_row_sees_and_masks_no_full_one(kind, monkeypatch) -> None:
    """Counts the forward's key tiles and the backward's key and query tiles against the dense mask."""
    case = KINDS[kind]
    visits = {name: {True: 0, False: 0} for name in ("_attend", "_dq_step", "_dkdv_step")}

    def count(module, name) -> None:
        run = getattr(module, name)

        def counted(*arguments):
            masked = getattr(arguments[-1], "value", arguments[-1])
            visits[name][masked] += 1
            return run(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(attention_forward, "_attend")
    count(attention_backward, "_dq_step")
    count(attention_backward, "_dkdv_step")
    tensors = case.tensors()
    out = attention(*(tensors[n].requires_grad_() for n in "qkv"), *case.cu_seqlens(), **case.options())
    out.backward(tensors["grad"])
    mask, k_lengths = visible(case), case.k_lengths or case.q_lengths
    by_query = _expected_visits(mask, case.q_lengths)
    by_key = _expected_visits(mask.t(), k_lengths)
    assert visits["_attend"] == visits["_dq_step"] == {kind: 2 * n for kind, n in by_query.items()}
    assert visits["_dkdv_step"] == {kind: 2 * n for kind, n in by_key.items()}


def _expected_visits(mask: torch.Tensor, lengths: tuple[int, ...], block: int = 32) -> dict[bool, int]:
    """Tiles by whether they need a mask: what a tile of rows sees, in tiles from the first seen position on."""
    visits = {True: 0, False: 0}
    begin = 0
    for length in lengths:
        for first in range(begin, begin + length, block):
            rows = mask[first : min(first + block, begin + length)]
            seen = rows.any(dim=0).nonzero().flatten()
            for at in range(int(seen[0]), int(seen[-1]) + 1, block) if len(seen) else ():
                tile = rows[:, at : at + block]
                visits[not (bool(tile.all()) and tile.shape[1] == block)] += 1
        begin += length
    return visits


def test_writes_every_row_and_nothing_around(monkeypatch) -> None:
    buffers = []

    def inside_a_buffer(shape, dtype):
        count = torch.Size(shape).numel()
        buffers.append((torch.full((count + 4096,), 7.0, dtype=dtype), count))
        return buffers[-1][0][2048 : 2048 + count].view(shape).fill_(NAN)

    def forward_outputs(q):
        return inside_a_buffer(q.shape, q.dtype), inside_a_buffer((q.shape[1], q.shape[0]), torch.float32)

    monkeypatch.setattr(op, "forward_outputs", forward_outputs)
    monkeypatch.setattr(op, "backward_outputs", lambda *qkv: tuple(inside_a_buffer(t.shape, t.dtype) for t in qkv))
    for case in (Case((33, 0, 5), slack=37, head_dim=20), Case((5, 33), (33, 4), slack=40, head_dim=20, heads=1)):
        judge_attention(attention, case)
    assert len(buffers) == 10
    for buffer, count in buffers:
        assert (buffer[:2048] == 7).all()
        assert (buffer[2048 + count :] == 7).all()
        assert not buffer[2048 : 2048 + count].isnan().any()


def test_a_nan_that_is_seen_stays_visible() -> None:
    case = Case((40,))
    tensors = case.tensors()
    tensors["k"][10] = NAN
    out, lse = attention(tensors["q"], tensors["k"], tensors["v"], *case.cu_seqlens(), return_lse=True)
    assert out[10:].isnan().all()
    assert lse[:, 10:].isnan().all()


def test_frozen_inputs() -> None:
    case = Case((20,))
    t = case.tensors()
    out = attention(t["q"], t["k"].requires_grad_(), t["v"], *case.cu_seqlens())
    out.sum().backward()
    assert t["k"].grad is not None
    assert t["q"].grad is None
    assert t["v"].grad is None


def test_outputs_are_new_tensors() -> None:
    case = Case((20,))
    t = case.tensors()
    out, lse = attention(t["q"], t["k"], t["v"], *case.cu_seqlens(), return_lse=True)
    assert not lse.requires_grad
    assert len({x.untyped_storage().data_ptr() for x in (t["q"], t["k"], t["v"], out, lse)}) == 5


def test_opcheck() -> None:
    case = Case((8, 4), heads=1, spans=((3, 6),), window=5, softcap=3.0, used=(8, 2))
    t = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in case.tensors().items()}
    options = case.options()
    spans = op.span_bounds(options["span_ends"])
    rule = (case.cu_seqlens()[0], None, *spans, options["seqused_k"], True, 5, 3.0, 0.25)
    leaves = [t[name].requires_grad_() for name in ("q", "k", "v")]
    torch.library.opcheck(op.attention_forward, (*leaves, *rule))
    out, lse = op.attention_forward(*leaves, *rule)
    saved = [x.detach() for x in (t["grad"], *leaves, out, lse)]
    torch.library.opcheck(op.attention_backward, (*saved, *rule))


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def block(q, k, v, cu_seqlens, span_ends):
        out, lse = attention(q * 2, k, v, cu_seqlens, span_ends=span_ends, return_lse=True)
        return out + lse.t()[..., None]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (12, 17):
        case = Case((length,), heads=1, spans=((3, 9),))
        t = case.tensors()
        arguments = (case.cu_seqlens()[0], case.options()["span_ends"])
        found = []
        for run in (block, compiled):
            leaves = [t[name].clone().requires_grad_() for name in ("q", "k", "v")]
            out = run(*leaves, *arguments)
            found.append([out, *torch.autograd.grad(out, leaves, t["grad"])])
        for eager, graph in zip(*found):
            torch.testing.assert_close(graph, eager, rtol=0, atol=1e-6)


def test_autocast_takes_its_dtype() -> None:
    case = Case((40,))
    t = case.tensors()
    leaves = [t[name].requires_grad_() for name in ("q", "k", "v")]
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention(*leaves, *case.cu_seqlens())
    assert out.dtype == torch.float16
    assert torch.equal(out, attention(*(x.half() for x in leaves), *case.cu_seqlens()))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


def test_head_columns() -> None:
    for head_dim in range(1, 257):
        main, tail = split_head_dim(head_dim)
        assert head_dim <= main + tail < max(2 * head_dim, 17)
    assert [split_head_dim(h) for h in (1, 64, 72, 80, 96, 100, 128)] == [
        (16, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 257}, ["1 to 256", "257", "TRICHORD_KERNELS=reference"]),
        ({"dtype": torch.float64}, ["float32, bfloat16 and float16", "float64"]),
    ],
)
def test_refuses_what_it_does_not_cover(change, words) -> None:
    case = replace(Case((4,)), **change)
    t = case.tensors()
    with pytest.raises(KernelError) as caught:
        attention(t["q"], t["k"], t["v"], *case.cu_seqlens(), scale=case.scale)
    assert all(word in str(caught.value) for word in words), caught.value
