"""FLOPs by formula against torch's own counter.

What is compared: one real training pass on the CPU, forward and backward, of tiny models over packed, ragged batches.
torch counts every matrix product and convolution as it runs. Two of our ops need a word:

- attention runs as its registered op, which the counter cannot look into. The tests give it a formula that counts the
  true cells of a dense mask, made here from the batch's segment ids and spans: 2 products forward, 4 backward.
- the vocabulary loss runs as its reference, whose products the counter sees, those that it makes a second time in the
  backward pass included: so the formula's `again` of that piece is compared as well.

The towers' attention is pinned to torch's plain kind, whose products are all visible and made once.
"""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_trichord import (
    AUDIO,
    ENCODERS,
    FUSION,
    OBJECTIVES,
    SAMPLES,
    SPECIAL,
    TEXT,
    TRUNK,
    VISION,
    VOCAB_SIZE,
    Item,
    tiny_batch,
    tiny_model,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trichord.batches.packed_batch import PackedBatch
from trichord.encoders.config import EncodersConfig, VisionConfig
from trichord.encoders.image_flops import ImageFlops, image_flops
from trichord.encoders.vision import VisionTower
from trichord.fusion import flops as flops_module
from trichord.fusion.config import FusionConfig
from trichord.fusion.counts import Counts, count_contrasts, executed_counts, useful_counts
from trichord.fusion.flops import Flops, flop_table, forward_flops, step_flops
from trichord.fusion.model import Trichord, build_model
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ContrastiveConfig, NextTokenConfig, ObjectivesConfig
from trichord.objectives.contrastive import FeatureTable, contrastive_gradients
from trichord.samples.config import ImageConfig
from trichord_kernels.ops.attention import attention as attention_op

RAGGED = [
    Item(True, 3000, 5, seed=1),
    Item(False, 9000, 3, seed=2),
    Item(True, None, 4, prompt=2, seed=3),
    Item(text=20, seed=4),
    Item(image=True, text=None),
]
BATCHES = {"ragged": RAGGED, "text only": [Item(text=6), Item(text=30, seed=1)], "empty": []}
NEXT_TOKEN = ObjectivesConfig(next_token=NextTokenConfig())
CONTRASTIVE = ObjectivesConfig(contrastive=ContrastiveConfig(embed_dim=16))


@pytest.fixture
def plain_attention(monkeypatch):
    """The trunk's attention through its op, the towers' in plain products."""
    monkeypatch.setattr("trichord.layers.attention.attention", attention_op)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def seen_cells(batch: PackedBatch, bidirectional: bool) -> int:
    """True cells of the mask, written out."""
    length = batch.input_ids.shape[0]
    positions = torch.arange(length)
    ends = batch.span_ends if bidirectional else positions + 1
    same = (batch.segment_ids[:, None] == batch.segment_ids[None]) & (batch.segment_ids >= 0)[:, None]
    return int((same & (positions[None] < ends[:, None])).sum())


def counter_for(batch: PackedBatch, bidirectional: bool) -> FlopCounterMode:
    cells = seen_cells(batch, bidirectional)

    def forward(q, *_, **__):
        return 2 * 2 * cells * q.shape[1] * q.shape[2]

    def backward(_, q, *__, **___):
        return 4 * 2 * cells * q.shape[1] * q.shape[2]

    forward._get_raw = backward._get_raw = True
    ops = torch.ops.trichord
    return FlopCounterMode(
        display=False, custom_mapping={ops.attention_forward: forward, ops.attention_backward: backward}
    )


def measure(model: Trichord, batch: PackedBatch) -> tuple[float, float]:
    """FLOPs of the forward pass, and of forward and backward, as torch counts them."""
    counter = counter_for(batch, model.bidirectional_images)
    with counter:
        out = model(batch)
        forward = counter.get_total_flops()
        loss = out.placeholder
        for part in (out.next_token_loss_sum, out.image_embeds, out.audio_embeds, out.text_embeds):
            loss = loss if part is None else loss + part.sum()
        loss.backward()
    return forward, counter.get_total_flops()


def predict(model: Trichord, batch: PackedBatch) -> tuple[float, float]:
    """The same by formula: what attention would make twice left out, what the vocabulary loss makes twice counted."""
    counts, table = executed_counts(batch, model), flop_table(model)
    rooms = step_flops(table, counts)
    logits = [piece for piece in table if piece.unit == "labels"]
    again = sum((f.again for f in step_flops(logits, counts).values()), 0.0)
    forward = sum(flops.forward for flops in rooms.values())
    return forward, forward + sum(flops.backward for flops in rooms.values()) + again


def agree(found: tuple[float, float], measured: tuple[float, float]) -> None:
    assert min(measured) > 0
    assert found == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("objectives", [OBJECTIVES, NEXT_TOKEN], ids=["both objectives", "next token"])
def test_a_packed_batch_counts_as_torch_counts_it(plain_attention, name, objectives):
    encoders = ENCODERS if objectives.contrastive else EncodersConfig(vision=VISION, audio=AUDIO)
    model, batch = tiny_model(encoders, objectives=objectives), tiny_batch(BATCHES[name])
    agree(predict(model, batch), measure(model, batch))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trunks_with_either_mask(plain_attention, family, bidirectional):
    """Long rows in a small trunk, so that attention is most of the work and a wrong area would show."""
    trunk = TRUNK.model_copy(update={"family": family, "intermediate_size": 8})
    fusion = FusionConfig(trunk=trunk, bidirectional_images=bidirectional)
    model = tiny_model(EncodersConfig(vision=VISION), fusion, NEXT_TOKEN)
    batch = tiny_batch([Item(True, None, 200), Item(text=150), Item(True, None, 90, seed=2)], num_tokens=600)
    assert batch.visible_pairs == seen_cells(batch, True) > batch.causal_pairs == seen_cells(batch, False)
    agree(predict(model, batch), measure(model, batch))
    # image blocks are small here: their pairs alone, to the last one
    (attention,) = [piece for piece in flop_table(model) if piece.unit.endswith("_pairs") and piece.room == "trunk"]
    width = TRUNK.num_heads * TRUNK.resolved_head_dim * TRUNK.num_layers
    counts = executed_counts(batch, model)
    assert attention.forward * getattr(counts, attention.unit) == 4 * width * seen_cells(batch, bidirectional)


@pytest.mark.parametrize(
    "encoders",
    [
        EncodersConfig(vision=VISION, text=TEXT),
        EncodersConfig(audio=AUDIO, text=TEXT),
        EncodersConfig(audio=AUDIO.model_copy(update={"kind": "whisper", "stride": 2}), text=TEXT),
        EncodersConfig(vision=VISION, text=TEXT.model_copy(update={"kind": "mean"})),
    ],
    ids=["vision and text", "mel transformer", "whisper", "mean of text"],
)
def test_towers_without_a_trunk(plain_attention, encoders):
    pair = "image-text" if encoders.vision else "audio-text"
    objectives = ObjectivesConfig(contrastive=ContrastiveConfig(embed_dim=16, pairs=(pair,)))
    model = tiny_model(encoders, FusionConfig(kind="none"), objectives)
    # no trunk to keep places for items, so the hand-made rows, which have them, fit any tower
    batch = tiny_batch(RAGGED)
    agree(predict(model, batch), measure(model, batch))


@pytest.mark.parametrize("frozen", [("vision",), ("audio", "text"), ("trunk",), ("vision", "audio", "trunk"), "all"])
def test_frozen_rooms_have_the_gradients_they_need_and_no_others(plain_attention, frozen):
    model, batch = tiny_model(), tiny_batch(RAGGED)
    for room in frozen if frozen != "all" else ("vision", "audio", "text", "trunk", "connectors", "heads"):
        getattr(model, room).requires_grad_(False)
    agree(predict(model, batch), measure(model, batch))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "eva02_tiny_patch14_224"])
def test_any_vision_transformer_counts_as_torch_counts_it(name):
    """The count is made on the meta device; real images on the CPU must cost the same."""
    check_images(VisionTower(VisionConfig(name=name), ImageConfig(size=224)))


class ConvTower(nn.Module):
    """A convolutional model of timm's where a tower is expected: normalised pixels in, its last map out."""

    def __init__(self, config: VisionConfig, image: ImageConfig):
        super().__init__()
        self.config, self.image_size = config, image.size
        self.backbone = timm.create_model(config.name, pretrained=False, num_classes=0, global_pool="")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixels.float())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_convolutional_models_too(monkeypatch, name):
    monkeypatch.setattr("trichord.encoders.image_flops.VisionTower", ConvTower)
    found = check_images(ConvTower(VisionConfig(name=name), ImageConfig(size=64)))
    assert found.stem > 0
    assert found.layers > found.stem
    assert found.attention == 0


def check_images(tower) -> ImageFlops:
    tower.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        tower(torch.zeros(2, 3, tower.image_size, tower.image_size, dtype=torch.uint8))
    found = image_flops(tower)
    assert 2 * (found.stem + found.layers + found.attention) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    return found


def test_a_vision_transformer_by_hand():
    """ViT, D wide, L deep, N patches of p x p: 2 N 3 p^2 D + L (24 (N + 1) D^2 + 4 (N + 1)^2 D)."""
    found = image_flops(VisionTower(VisionConfig(name="vit_small_patch16_224"), ImageConfig(size=224)))
    width, depth, patches = 384, 12, 196
    assert found.stem == 2 * patches * 3 * 16**2 * width
    assert found.layers == depth * 24 * (patches + 1) * width**2
    assert found.attention == depth * 4 * (patches + 1) ** 2 * width


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_contrastive_loss_counts_its_similarities(kind):
    config = ContrastiveConfig(embed_dim=16, kind=kind, pairs=("image-text", "audio-text"))
    model = tiny_model(objectives=ObjectivesConfig(next_token=NextTokenConfig(), contrastive=config))
    slots, ranks = 24, 3

    def table(size: int) -> FeatureTable:
        names = ("image", "audio", "text")
        features = {name: torch.randn(size, 16) for name in names}
        return FeatureTable(features, {n: torch.ones(size, dtype=torch.bool) for n in names}, torch.arange(size))

    # torch has no formula for the product that adds in place; the plain path makes no logit twice, kernels do
    added = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        contrastive_gradients(config, table(slots), table(slots * ranks), torch.ones(1), torch.zeros(1))
    counts = Counts(contrasts=count_contrasts(slots, ranks, 2, 2 if kind == "infonce" else 1))
    assert step_flops(flop_table(model), counts)["heads"].model == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_checkpointing_and_a_second_pass_are_counted_apart(plain_attention):
    """Activation checkpointing runs the blocks once more: torch counts it, MFU must not."""
    model, batch = tiny_model(), tiny_batch(RAGGED)
    plain = measure(model, batch)[1]
    model.enable_activation_checkpointing()
    recomputed = measure(model, batch)[1]
    counts, table = executed_counts(batch, model), flop_table(model)
    once, again = step_flops(table, counts), step_flops(table, counts, blocks_again=1.0)
    assert sum(f.model for f in once.values()) == sum(f.model for f in again.values())
    extra = sum(again[room].again - once[room].again for room in once)
    assert extra == pytest.approx(recomputed - plain, rel=0.01)
    twice = step_flops(table, counts, towers_twice=True)
    assert twice["vision"].again - once["vision"].again == once["vision"].forward
    assert twice["trunk"] == once["trunk"]


def test_a_frozen_room_is_not_run_again():
    model = tiny_model()
    model.vision.requires_grad_(False)
    rooms = step_flops(flop_table(model), executed_counts(tiny_batch(RAGGED), model), blocks_again=1.0)
    assert rooms["vision"].backward == rooms["vision"].again == 0
    assert rooms["trunk"].again > rooms["trunk"].forward / 2


def test_the_meta_device_gives_the_same_table():
    with torch.device("meta"):
        shapes = build_model(ENCODERS, FUSION, OBJECTIVES, SAMPLES, LayersConfig(), VOCAB_SIZE, SPECIAL)
    assert flop_table(shapes) == flop_table(tiny_model())


def test_useful_counts_leave_out_slack_padding_and_placeholders():
    model = tiny_model()
    packed, loose = tiny_batch(RAGGED[:2]), tiny_batch(RAGGED[:2], num_tokens=400)
    assert useful_counts(packed, model) == useful_counts(loose, model)
    assert executed_counts(loose, model).tokens == 400
    nothing = useful_counts(tiny_batch([]), model)
    assert nothing == Counts()
    assert executed_counts(tiny_batch([]), model).images == 1
    one, both = useful_counts(tiny_batch([RAGGED[0]]), model), useful_counts(tiny_batch(RAGGED[:2]), model)
    other = useful_counts(tiny_batch([RAGGED[1]]), model)
    assert one + other == both


def test_forward_flops_name_every_room():
    model = tiny_model()
    found = forward_flops(model, executed_counts(tiny_batch(RAGGED), model))
    assert set(found) == {"vision", "audio", "text", "heads", "connector", "trunk"}
    assert min(found.values()) > 0
    assert Flops(1.0, 2.0, 0.5) + Flops(1.0) == Flops(2.0, 2.0, 0.5)
    assert flops_module.Piece("trunk", "tokens", 1.0, 2.0).again == 0
