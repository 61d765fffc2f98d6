"""Rope's Triton kernels, run by Triton's interpreter on the CPU.

Not collected by a plain `pytest`: TRITON_INTERPRET must be set before triton is imported and would spoil the
ahead-of-time compilations of the same process. `test_kernels_interpreter.py` runs this file in its own process.
float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rule import judge, sum_floor

from trichord_kernels import reference, rope
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.errors import KernelError
from trichord_kernels.ops import rope as op
from trichord_kernels.reference.rope import assign_axes

LEAST_CASES = 105
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
# T, query heads, kv heads, H, frequencies: several heads per step and one, odd sizes, partial rotary, no tokens.
SHAPES = [
    (13, 8, 4, 64, 32),
    (19, 3, 1, 80, 40),
    (5, 4, 4, 96, 48),
    (9, 6, 2, 128, 64),
    (3, 2, 2, 256, 128),
    (7, 4, 2, 64, 16),
    (6, 2, 1, 10, 3),
    (1, 1, 1, 2, 1),
    (0, 4, 2, 8, 4),
]
NORMS = ["plain", "norms", "q_norm"]
LAYOUTS = ["heads_first", "fused_projection", "last_axis_strided", "odd_strides", "expanded_heads", "unaligned"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _inv_freq(num_frequencies):
    return 10000.0 ** -(torch.arange(num_frequencies) / num_frequencies)


def _operands(shape, dtype, norm="plain", weight_dtype=None):
    """Inputs that take gradients, the other arguments, and incoming gradients."""
    tokens, heads, kv_heads, head_dim, num_frequencies = shape
    inputs = {name: torch.randn(tokens, n, head_dim).to(dtype) for name, n in (("q", heads), ("k", kv_heads))}
    for name in {"plain": [], "q_norm": ["q_weight"], "norms": ["q_weight", "k_weight"]}[norm]:
        inputs[name] = torch.randn(head_dim).to(weight_dtype or dtype)
    others = {"position_ids": torch.randint(0, 5000, (tokens,)), "inv_freq": _inv_freq(num_frequencies), "eps": EPS}
    grads = {name: torch.randn_like(inputs[name]) for name in ("q", "k")}
    return inputs, others, grads


def _run(function, inputs, others, grads):
    """Every output and gradient by name. Inputs and incoming gradients must come back unchanged."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    before = [t.clone() for t in (*inputs.values(), *grads.values())]
    out = dict(zip(("q", "k"), function(**leaves, **others)))
    torch.autograd.backward([out[name] for name in grads], list(grads.values()))
    after = [*inputs.values(), *grads.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after)), "an input or incoming gradient was changed"
    named = {f"{name}_out": t.detach() for name, t in out.items()}
    return named | {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _sum_floors(inputs, others, grads):
    """What the order of the weights' sums over tokens and heads may cost."""
    floors = {}
    for name in ("q", "k"):
        if f"{name}_weight" in inputs and name in grads:
            turned_back = dict(others, inv_freq=-others["inv_freq"])
            grad, _ = reference.rope(grads[name].double(), grads[name].double(), **turned_back)
            x = inputs[name].double()
            normed = reference.rms_norm(x, torch.ones(x.shape[-1]).double(), EPS)
            floors[f"grad_{name}_weight"] = sum_floor((grad * normed).reshape(-1, x.shape[-1]))
    return floors


def _judge(inputs, others, grads, record_property=None):
    wide, wide_grads = ({name: t.double() for name, t in group.items()} for group in (inputs, grads))
    ours = _run(rope, inputs, others, grads)
    plain = _run(reference.rope, inputs, others, grads)
    exact = _run(reference.rope, wide, others, wide_grads)
    assert ours.keys() == exact.keys()
    ratios = judge(ours, plain, exact, _sum_floors(inputs, others, grads))
    if record_property:
        record_property("worst_error_ratio", max(r.ratio for r in ratios))
    again = _run(rope, inputs, others, grads)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the second run gave other bits"
    return ours


def _in_layout(values, layout):
    """`values` (T, N, H) in that memory layout with NaN around them; `expanded_heads` is head 0 repeated."""
    tokens, heads, head_dim = values.shape
    if layout == "heads_first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "last_axis_strided":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded_heads":
        return values[:, :1].expand(values.shape)
    token_stride, head_stride, offset = {
        "fused_projection": ((heads + 4) * head_dim, head_dim, 2 * head_dim),
        "odd_strides": (heads * (head_dim + 3) + 5, head_dim + 3, 64),
        "unaligned": (heads * head_dim, head_dim, 65),
    }[layout]
    buffer = values.new_full((offset + tokens * token_stride + 64,), float("nan"))
    return buffer.as_strided(values.shape, (token_stride, head_stride, 1), offset).copy_(values)


def test_the_kernel_itself_runs() -> None:
    assert choose_backend(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("norm", ["plain", "norms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype, norm, record_property) -> None:
    _judge(*_operands(shape, dtype, norm), record_property)


@pytest.mark.parametrize("norm", ["plain", "norms"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts_and_poisoned_surroundings(layout, norm, record_property) -> None:
    inputs, others, grads = _operands((7, 4, 4, 32, 16), torch.float16, norm)
    inputs |= {name: _in_layout(inputs[name], layout) for name in ("q", "k")}
    _judge(inputs, others, grads, record_property)


@pytest.mark.parametrize("norm", ["plain", "norms"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradient_layouts(layout, norm, record_property) -> None:
    inputs, others, grads = _operands((7, 4, 4, 32, 16), torch.float32, norm)
    grads = {name: _in_layout(grad, layout) for name, grad in grads.items()}
    _judge(inputs, others, grads, record_property)


def test_incoming_gradients_of_stride_0(record_property) -> None:
    inputs, others, grads = _operands((7, 4, 2, 32, 16), torch.float32, "norms")
    ones = {name: torch.ones(()).expand(grad.shape) for name, grad in grads.items()}  # what .sum().backward() sends
    _judge(inputs, others, ones, record_property)


@pytest.mark.parametrize("sections", [(6, 5, 5), (2, 7, 7), (9, 0, 7), (1, 4, 3, 8), (16,)], ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
def test_axes_and_fractional_positions(layout, sections, record_property) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 16), torch.float32, "norms")
    others |= {"position_ids": torch.rand(len(sections), 9) * 900, "sections": sections, "layout": layout}
    _judge(inputs, others, grads, record_property)


def test_axes_with_partial_rotary(record_property) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 6), torch.float16, "norms")
    _judge(inputs, others | {"position_ids": torch.rand(3, 9), "sections": (2, 3, 1)}, grads, record_property)


@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
def test_the_kernel_deals_axes_as_the_reference_does(layout) -> None:
    for sections in [(24, 20, 20), (16, 24, 24), (1, 0, 5), (0, 3), (7,), (5, 1, 4, 2, 2), (0, 0, 4)]:
        columns = [-1] * sum(sections)
        groups = op.deal_axes(sections, layout)
        for first, period, turn, axis in zip(*[iter(groups)] * 4):
            columns[first + turn :: period] = [axis] * len(columns[first + turn :: period])
        assert columns == assign_axes(sections, layout), sections


@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
def test_equal_axes_give_exactly_the_one_axis_result(layout) -> None:
    inputs, others, _ = _operands((9, 4, 2, 32, 16), torch.float32)
    one = rope(**inputs, **others)
    axes = {"sections": (6, 5, 5), "layout": layout}
    for position_ids in (others["position_ids"], others["position_ids"].expand(3, 9)):
        for ours, want in zip(rope(**inputs, **(others | axes | {"position_ids": position_ids})), one):
            assert torch.equal(ours, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda positions: positions.to(torch.int32),
        lambda positions: positions.double(),
        lambda positions: positions.half(),
        lambda positions: positions[None],
        lambda positions: torch.stack((positions, positions + 1), dim=-1)[:, 0],
    ],
    ids=["int32", "float64", "float16", "one_axis", "strided"],
)
def test_positions_of_any_type_and_stride(make) -> None:
    inputs, others, _ = _operands((9, 4, 2, 32, 16), torch.float32)
    others["position_ids"] %= 2048  # exact in float16
    other = others | {"position_ids": make(others["position_ids"])}
    assert all(torch.equal(a, b) for a, b in zip(rope(**inputs, **others), rope(**inputs, **other)))


def test_strided_axes_of_positions(record_property) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 16), torch.float32)
    positions = (torch.rand(9, 3) * 100).T
    _judge(inputs, others | {"position_ids": positions, "sections": (6, 5, 5)}, grads, record_property)


def test_cos_and_sin_are_exact_at_large_positions() -> None:
    """The kernel reduces the angle itself: to 2^-23 of the float64 cosine of the float32 angle, up to 100 000."""
    positions = torch.cat([torch.arange(64), torch.randint(0, 100_000, (64,)), -torch.randint(0, 99_999, (64,))])
    inv_freq = _inv_freq(32)
    q = torch.cat([torch.ones(192, 1, 32), torch.zeros(192, 1, 32)], dim=-1)
    cos, sin = rope(q, q, positions, inv_freq)[0][:, 0].double().chunk(2, dim=-1)
    angles = (positions[:, None].float() * inv_freq).double()
    assert (cos - angles.cos()).abs().max() <= 2**-23
    assert (sin - angles.sin()).abs().max() <= 2**-23


def test_rounds_cos_and_sin_where_transformers_does() -> None:
    q = torch.cat([torch.ones(64, 1, 32), torch.zeros(64, 1, 32)], dim=-1).half()
    operands = (q, q, torch.randint(0, 5000, (64,)), _inv_freq(32))
    ours, plain = (function(*operands, attention_scaling=1.2)[0] for function in (rope, reference.rope))
    assert (ours != plain).float().mean() < 0.002  # a float32 cosine one bit off may round the other way


def test_attention_scaling(record_property) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 8), torch.float32, "norms")
    _judge(inputs, others | {"attention_scaling": 1.3}, grads, record_property)


def test_float32_weights_with_half_activations(record_property) -> None:
    ours = _judge(*_operands((9, 4, 2, 32, 16), torch.float16, "norms", torch.float32), record_property)
    assert ours["q_out"].dtype == torch.float16
    assert ours["grad_q_weight"].dtype == torch.float32


def test_rounds_where_llama_rounds_the_norm() -> None:
    """Without the rounding before the weight about a fifth of the float16 results differ from the torch path."""
    inputs, others, _ = _operands((16, 4, 2, 64, 32), torch.float16, "norms")
    others["position_ids"] = torch.zeros(16)  # cos 1, sin 0: the norm alone
    for ours, plain in zip(rope(**inputs, **others), reference.rope(**inputs, **others)):
        assert (ours != plain).float().mean() < 0.01


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("used", ["q", "k"])
def test_only_one_output_used(used, norm, record_property) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 16), torch.float32, norm)
    ours = _run(rope, inputs, others, {used: grads[used]})
    plain = _run(reference.rope, inputs, others, {used: grads[used]})
    assert {name for name in ours if "grad" in name} == {name for name in plain if "grad" in name}
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-5)


def test_frozen_weights_and_inputs_cost_no_work(monkeypatch) -> None:
    inputs, others, grads = _operands((9, 4, 2, 32, 16), torch.float32, "norms")
    asked = []

    def spy(*arguments):
        asked.append([arguments[i] is not None for i in (0, 1)] + list(arguments[-2:]))
        return backward(*arguments)

    backward = op.rope_backward
    monkeypatch.setattr(op, "rope_backward", spy)
    for frozen, want in [
        (("q_weight", "k_weight"), [True, True, False, False]),
        (("q", "q_weight"), [False, True, False, True]),
        (("k",), [True, True, True, True]),
    ]:
        leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in inputs.items()}
        torch.autograd.backward(rope(**leaves, **others), tuple(grads.values()))
        assert asked.pop() == want
        assert {name for name, leaf in leaves.items() if leaf.grad is None} == set(frozen)


def test_saves_neither_q_nor_k_without_norms() -> None:
    inputs, others, _ = _operands((9, 4, 2, 32, 16), torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        rope(**{name: t.requires_grad_() for name, t in inputs.items()}, **others)
    assert sum(sizes) == 9 + 16  # positions and frequencies


def test_writes_nothing_around_its_outputs(monkeypatch) -> None:
    buffers = []

    def inside_a_buffer(like):
        buffers.append((torch.full((like.numel() + 4096,), 7.0, dtype=like.dtype), like.numel()))
        return buffers[-1][0][2048 : 2048 + like.numel()].view(like.shape)

    for name in ("_forward_outputs", "_backward_outputs"):
        make = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, make=make: tuple(inside_a_buffer(t) for t in make(*a)))
    for norm, shape in (("norms", (9, 3, 1, 40, 20)), ("plain", (5, 4, 2, 48, 5))):
        _run(rope, *_operands(shape, torch.float32, norm))
    assert len(buffers) == 12
    for buffer, count in buffers:
        assert (buffer[:2048] == 7).all()
        assert (buffer[2048 + count :] == 7).all()


def test_weight_storage_may_be_swapped_before_backward() -> None:
    """ZeRO-3 frees a parameter's storage after forward and puts a new one in place before backward."""
    inputs, others, grads = _operands((9, 4, 2, 32, 16), torch.float32, "norms")
    want = _run(rope, inputs, others, grads)
    q, k = (inputs[name].detach().requires_grad_() for name in ("q", "k"))
    weights = {name: torch.nn.Parameter(inputs[name].clone()) for name in ("q_weight", "k_weight")}
    for value in (None, 0.0):
        out = rope(q, k, **weights, **others)
        for name, weight in weights.items():
            weight.data = torch.empty(0)
            weight.data = inputs[name].clone() if value is None else torch.zeros(32)
        q.grad = k.grad = None
        torch.autograd.backward(out, tuple(grads.values()))
        # The second time round the weights are 0: the backward really reads the Parameters, no copies from forward.
        for name, x in (("q", q), ("k", k)):
            assert torch.equal(x.grad, want[f"grad_{name}"]) if value is None else not x.grad.any()


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm) -> None:
    inputs, others, grads = _operands((6, 4, 2, 24, 12), torch.float32, norm)
    q, k = (inputs[name].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for name in ("q", "k"))
    weights = [inputs[name].requires_grad_() if name in inputs else None for name in ("q_weight", "k_weight")]
    constants = (op.deal_axes(None, "interleaved"), EPS, 1.0)
    operands = (others["position_ids"], others["inv_freq"], *weights)
    torch.library.opcheck(op.rope_forward, (q, k, *operands, *constants))
    detached = [None if t is None else t.detach() for t in (q, k, *operands)]
    for wanted in (False, True):
        flags = [wanted and weight is not None for weight in weights]
        torch.library.opcheck(op.rope_backward, (*grads.values(), *detached, *constants, *flags))
    torch.library.opcheck(
        op.rope_backward, (None, grads["k"], None, *detached[1:4], None, *detached[5:], *constants, False, False)
    )


def test_compiles_without_a_graph_break_at_two_lengths() -> None:
    def block(q, k, position_ids, inv_freq, q_weight):
        q, k = rope(q * 2, k, position_ids, inv_freq, sections=(6, 5, 5), q_weight=q_weight, eps=EPS)
        return rope(q, k, position_ids[0], inv_freq)[0] + k.sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        inputs = [torch.randn(length, 4, 32), torch.randn(length, 2, 32), torch.randn(32)]
        eager, graph = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
        constants = (torch.rand(3, length), _inv_freq(16))
        want, got = (run(x[0], x[1], *constants, x[2]) for run, x in ((block, eager), (compiled, graph)))
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(want, got)
        for a, b in zip(eager, graph):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    inputs, others, _ = _operands((5, 4, 2, 32, 16), torch.float16, "norms", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rope(**inputs, **others)
    assert under[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(under, rope(**inputs, **others)))


def test_outputs_are_new_tensors() -> None:
    inputs, others, _ = _operands((5, 4, 2, 32, 16), torch.float32)
    tensors = (*inputs.values(), *rope(**inputs, **others))
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 4


Q, P = torch.zeros(3, 2, 8), torch.zeros(3)


@pytest.mark.parametrize(
    ("operands", "error", "words"),
    [
        ((torch.zeros(3, 2, 258), torch.zeros(3, 2, 258), P, torch.ones(4)), KernelError, ["at most 256", "258"]),
        (
            (torch.zeros(3, 2, 9), torch.zeros(3, 2, 9), P, torch.ones(4)),
            KernelError,
            ["even", "9", "TRICHORD_KERNELS"],
        ),
        ((Q.double(), Q.double(), P, torch.ones(4)), KernelError, ["float32, bfloat16 and float16", "float64"]),
        ((Q, Q, P.to("meta"), torch.ones(4)), ValueError, ["one device", "cpu", "meta"]),
        ((Q, Q, P[:2], torch.ones(4)), ValueError, ["rope: expected position_ids"]),
    ],
)
def test_refuses_what_it_does_not_cover(operands, error, words) -> None:
    with pytest.raises(error) as caught:
        rope(*operands)
    assert all(word in str(caught.value) for word in words), caught.value
