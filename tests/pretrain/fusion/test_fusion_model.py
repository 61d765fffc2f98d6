"""The modality rule, packing, masks and freezing of the whole model, on a CPU in fp32."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_trichord import AUDIO, ENCODERS, FUSION, OBJECTIVES, TEXT, VISION, Item, tiny_batch, tiny_model

from trichord.core.errors import ConfigError
from trichord.encoders.config import EncodersConfig
from trichord.fusion.config import FusionConfig
from trichord.fusion.model import ROOMS, ModelOutput, Trichord, param_room
from trichord.objectives.config import ContrastiveConfig, NextTokenConfig, ObjectivesConfig

FULL = [Item(True, 3000, 5, seed=1), Item(False, 1200, 3, seed=2), Item(True, None, 4, prompt=2, seed=3)]
BATCHES = {
    "all": FULL,
    "no image": [Item(audio=2000), Item(audio=900, seed=1)],
    "no audio": [Item(image=True), Item(image=True, seed=1)],
    "text only": [Item(text=6), Item(text=2, seed=1)],
    "no label": [Item(image=True, text=None)],
    "one modality, some without text": [Item(audio=700, text=None), Item(audio=900)],
    "empty": [],
}


def total_loss(out: ModelOutput) -> torch.Tensor:
    """A loss that uses each output with uneven weights."""
    loss = out.placeholder + 0.3 * out.next_token_loss_sum + out.logit_scale.sum() / 10
    for number, embeds in enumerate((out.image_embeds, out.audio_embeds, out.text_embeds)):
        weights = torch.linspace(-1, 1 + number, embeds.shape[1])
        loss = loss + (embeds * weights).sum()
    return loss


@pytest.fixture(scope="module")
def model() -> Trichord:
    return tiny_model()


def count_calls(model: Trichord, run) -> list[tuple[str, int]]:
    """Names of all modules with parameters of their own, in the order called, and how often each."""
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("recompute", [False, True])
def test_every_batch_calls_the_same_modules_in_the_same_order(recompute):
    model = tiny_model()
    if recompute:
        model.enable_activation_checkpointing()
    reference = None
    for name, items in BATCHES.items():
        batch = tiny_batch(items)
        calls = count_calls(model, lambda batch=batch: total_loss(model(batch)).backward())
        reference = reference or calls
        assert calls == reference, (
            f"{name}: {Counter(calls) - Counter(reference)} {Counter(reference) - Counter(calls)}"
        )
    owners = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners == set(reference), "a module with parameters is never called"


def test_towers_only_calls_do_not_depend_on_the_batch(model):
    reference = None
    for items in BATCHES.values():
        batch = tiny_batch(items)
        with torch.no_grad():
            calls = count_calls(model, lambda batch=batch: model(batch, towers_only=True))
        reference = reference or calls
        assert calls == reference
        assert not any(name.startswith(("trunk", "connectors")) for name in calls)


@pytest.mark.parametrize("name", BATCHES)
def test_every_parameter_has_a_finite_gradient_and_an_absent_tower_a_zero_one(model, name):
    items = BATCHES[name]
    model.zero_grad(set_to_none=True)
    out = model(tiny_batch(items))
    total_loss(out).backward()
    assert out.placeholder.item() == 0.0
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    absent = {"vision": not any(i.image for i in items), "audio": not any(i.audio for i in items)}
    absent["connectors.image"], absent["connectors.audio"] = absent["vision"], absent["audio"]
    absent["heads.image"], absent["heads.audio"] = absent["vision"], absent["audio"]
    absent["text"] = absent["heads.text"] = not any(i.text for i in items)
    absent["trunk"] = not any(i.text for i in items)
    for n, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), n
        is_absent = next((gone for prefix, gone in absent.items() if n.startswith(prefix + ".")), False)
        if is_absent:
            assert not p.grad.any(), f"{n} has a gradient though its modality is absent"


@pytest.mark.parametrize("name", BATCHES)
def test_the_placeholder_alone_reaches_everything_but_the_trunk(model, name):
    """A loss may use any subset of the outputs; what it leaves out must still run backwards on every rank."""
    model.zero_grad(set_to_none=True)
    model(tiny_batch(BATCHES[name])).placeholder.backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None}
    assert missing == {n for n, _ in model.named_parameters() if n.startswith("trunk.")}
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", BATCHES)
def test_no_tower_ever_sees_an_empty_batch(model, name):
    """Kernels for zero items fail or are skipped on some devices."""
    sizes: list[int] = []
    towers = (model.vision, model.audio.encoder, model.text, model.connectors["image"], *model.heads.values())
    hooks = [tower.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0])) for tower in towers]
    model(tiny_batch(BATCHES[name]))
    for hook in hooks:
        hook.remove()
    assert len(sizes) == len(towers)
    assert min(sizes) >= 1


@pytest.mark.parametrize("room", ["vision", "audio", "text", "trunk", "connectors", "heads"])
def test_a_present_tower_learns(model, room):
    model.zero_grad(set_to_none=True)
    total_loss(model(tiny_batch(FULL))).backward()
    gradients = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if n.startswith(room + ".")}
    dead = [n for n, largest in gradients.items() if largest == 0.0]
    assert dead == [], f"no gradient reaches {dead}"


def test_gradients_reach_towers_that_no_loss_uses():
    """An image outside the stream and no contrastive loss: the tower must still run backwards, as on other ranks."""
    objectives = ObjectivesConfig(next_token=NextTokenConfig())
    model = tiny_model(EncodersConfig(vision=VISION, audio=AUDIO), objectives=objectives)
    out = model(tiny_batch([Item(image=True, text=None)]))
    assert out.image_embeds is None
    assert out.logit_scale is None
    (out.next_token_loss_sum + out.placeholder).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_smoothing_and_z_loss_of_the_objective_reach_the_loss_in_training_only():
    batch = tiny_batch(FULL)
    plain = tiny_model(objectives=ObjectivesConfig(next_token=NextTokenConfig(), contrastive=ContrastiveConfig()))
    regularised = NextTokenConfig(label_smoothing=0.1, z_loss=0.01)
    model = tiny_model(objectives=ObjectivesConfig(next_token=regularised, contrastive=ContrastiveConfig()))
    labels = batch.labels[batch.label_index]
    logits = model.logits(batch)[batch.label_index]
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    expected = expected + 0.01 * logits.logsumexp(1).square().sum()
    torch.testing.assert_close(model(batch).next_token_loss_sum, expected, rtol=1e-5, atol=0)
    assert torch.equal(model.eval()(batch).next_token_loss_sum, plain(batch).next_token_loss_sum)


def test_labels_count_by_the_weight_of_their_source_in_training_only(model):
    batch = tiny_batch(FULL)
    sources = torch.arange(batch.num_segments) % 2
    batch = replace(batch, sample_ids=torch.stack([sources, *batch.sample_ids.T[1:]], dim=1))
    plain, weighed = model(batch), model(batch.weighed(torch.tensor([1.0, 3.0])))
    of_second = sources[batch.segment_ids[batch.label_index].long()] == 1
    expected = plain.next_token_losses.sum() + 2 * plain.next_token_losses[of_second].sum()
    torch.testing.assert_close(weighed.next_token_loss_sum, expected, rtol=1e-6, atol=0)
    assert torch.equal(weighed.next_token_losses, plain.next_token_losses)
    assert batch.weighed(torch.tensor([1.0, 3.0])).label_weight == batch.num_labels + 2 * int(of_second.sum())
    model.eval()
    assert torch.equal(model(batch.weighed(torch.tensor([1.0, 3.0]))).next_token_loss_sum, plain.next_token_loss_sum)


def test_packed_equals_one_by_one(model):
    """Measured worst difference 2.4e-6 of logits of size 2.8 (fp32, one thread); the bound is 4 times that."""
    packed = model.logits(tiny_batch(FULL, num_tokens=110))
    start = 0
    for item in FULL:
        alone = tiny_batch([item], num_tokens=1)
        logits = model.logits(alone)
        ours = packed[start : start + logits.shape[0]]
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
        start += logits.shape[0]


def test_loss_and_embeddings_do_not_depend_on_packing(model):
    """Measured worst: loss 1.1e-7 relative, embeddings 2.2e-7."""
    together = model(tiny_batch(FULL))
    apart = [model(tiny_batch([item])) for item in FULL]
    total = sum(out.next_token_loss_sum for out in apart)
    torch.testing.assert_close(together.next_token_loss_sum, total, rtol=1e-6, atol=0)
    for name in ("image_embeds", "audio_embeds", "text_embeds"):
        expected = torch.cat([getattr(out, name) for out in apart])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-6)


def test_who_sees_whom(model):
    """Read off gradients: which input positions change the hidden state at a position."""
    from trichord.fusion.trunk import run_packed

    batch = tiny_batch([Item(True, None, 3), Item(False, 900, 3, seed=1)], num_tokens=40)
    embeds = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hidden = run_packed(model.trunk, embeds, batch, bidirectional_images=True)
    segments, (image_start, image_end) = batch.segment_ids.tolist(), batch.image_spans[0].tolist()
    for t in range(batch.useful_tokens):
        (gradient,) = torch.autograd.grad(hidden[t].square().sum(), embeds, retain_graph=True)
        seen = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
        last = image_end - 1 if image_start <= t < image_end else t
        assert seen == {j for j in range(last + 1) if segments[j] == segments[t]}, f"position {t}"


def test_bidirectional_images_can_be_switched_off():
    batch = tiny_batch([Item(True, None, 3)])
    causal = tiny_model(fusion=FUSION.model_copy(update={"bidirectional_images": False})).logits(batch)
    both_ways = tiny_model().logits(batch)
    image_start, image_end = batch.image_spans[0].tolist()
    assert torch.equal(causal[:image_start], both_ways[:image_start])
    assert not torch.allclose(causal[image_start : image_end - 1], both_ways[image_start : image_end - 1])


def test_text_embeddings_are_zero_without_text(model):
    out = model(tiny_batch([Item(image=True, text=None), Item(text=3)]))
    assert not out.text_embeds[0].any()
    torch.testing.assert_close(out.text_embeds[1].norm(), torch.tensor(1.0))


def test_activation_checkpointing_changes_nothing():
    batch = tiny_batch(FULL)
    gradients = []
    for recompute in (False, True):
        model = tiny_model()
        if recompute:
            model.enable_activation_checkpointing()
        total_loss(model(batch)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_freezing_keeps_towers_in_the_call_order():
    frozen = EncodersConfig(
        vision=VISION.model_copy(update={"freeze": True}),
        audio=AUDIO.model_copy(update={"freeze": True}),
        text=TEXT.model_copy(update={"freeze": True}),
    )
    fusion = FusionConfig(trunk=FUSION.trunk.model_copy(update={"freeze": True}))
    model = tiny_model(frozen, fusion)
    calls = count_calls(model, lambda: total_loss(model(tiny_batch([]))).backward())
    assert calls == count_calls(model, lambda: total_loss(model(tiny_batch(FULL))).backward())
    trained = {param_room(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector", "heads"}


def test_rooms_cover_all_parameters(model):
    assert {param_room(name) for name, _ in model.named_parameters()} == set(ROOMS)
    with pytest.raises(ValueError, match="belongs to no room"):
        param_room("elsewhere.weight")


def test_towers_without_a_trunk():
    model = tiny_model(fusion=FusionConfig(kind="none"), objectives=ObjectivesConfig(contrastive=ContrastiveConfig()))
    out = model(tiny_batch(FULL))
    assert out.next_token_loss_sum is None
    assert out.text_embeds.shape == (3, 256)
    assert {param_room(n) for n, _ in model.named_parameters()} == {"vision", "audio", "text", "heads"}


def test_builds_on_the_meta_device_with_the_same_names_and_shapes(model):
    with torch.device("meta"):
        planned = tiny_model()
    real = {n: (tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()}
    assert {n: (tuple(p.shape), p.requires_grad) for n, p in planned.named_parameters()} == real
    assert all(p.is_meta for p in planned.parameters())


def test_no_zero_dimensional_parameters_and_no_buffers(model):
    assert [n for n, p in model.named_parameters() if p.ndim == 0] == []
    assert [n for n, _ in model.named_buffers()] == []


def test_runs_in_bf16_with_exact_rotary_angles():
    model = tiny_model().bfloat16()
    out = model(tiny_batch(FULL))
    total_loss(out).backward()
    reference = tiny_model()(tiny_batch(FULL))
    assert out.image_embeds.dtype == torch.float32
    assert out.next_token_loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.next_token_loss_sum, reference.next_token_loss_sum, rtol=0.03, atol=0)


def test_runs_under_autocast():
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tiny_batch(FULL))
        total_loss(out).backward()
    torch.testing.assert_close(
        out.next_token_loss_sum, tiny_model()(tiny_batch(FULL)).next_token_loss_sum, rtol=0.03, atol=0
    )


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_logit_scale_stays_below_its_cap_and_can_come_back(kind):
    contrastive = ContrastiveConfig(kind=kind, max_logit_scale=50.0, init_temperature=0.1, init_logit_bias=-7.0)
    model = tiny_model(objectives=OBJECTIVES.model_copy(update={"contrastive": contrastive}))
    scale, bias = model.logit_scale()
    torch.testing.assert_close(scale, torch.tensor([10.0]))
    assert bias.tolist() == [-7.0 if kind == "sigmoid" else 0.0]
    with torch.no_grad():
        model.logit_scale.log_scale.fill_(9.0)
    scale, _ = model.logit_scale()
    torch.testing.assert_close(scale, torch.tensor([50.0]))
    for sign, moves in ((1.0, True), (-1.0, False)):  # gradient descent: a positive gradient lowers the parameter
        model.zero_grad()
        (sign * model.logit_scale()[0]).sum().backward()
        assert bool(model.logit_scale.log_scale.grad.any()) == moves


@pytest.mark.parametrize(
    ("encoders", "fusion", "objectives", "message"),
    [
        (ENCODERS, FUSION, ObjectivesConfig(next_token=NextTokenConfig()), "encoders.text is only used by"),
        (ENCODERS, FUSION, ObjectivesConfig(contrastive=ContrastiveConfig()), "fusion.trunk is only used by"),
    ],
)
def test_parts_that_nothing_uses_are_refused(encoders, fusion, objectives, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(encoders, fusion, objectives)


def test_an_item_with_the_wrong_number_of_places_names_both_numbers(model):
    from dataclasses import replace

    batch = tiny_batch([Item(image=True)])
    wrong = replace(batch, image_counts=(7,))
    with pytest.raises(ValueError, match="image 0 has 7 places in the stream, but the encoder made 9 tokens"):
        model(wrong)
