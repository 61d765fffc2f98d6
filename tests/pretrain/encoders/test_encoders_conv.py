"""Convolutional vision towers: feature maps as tokens, batch statistics over real items only, buffers moved once."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from trichord.core.errors import ConfigError
from trichord.encoders.config import VisionConfig
from trichord.encoders.lengths import image_grid
from trichord.encoders.vision import VisionTower, create_backbone
from trichord.layers.batch_norm import SharedBatchNorm, has_shared_statistics, share_batch_norms
from trichord.layers.recompute import recompute_blocks
from trichord.layers.stored import stored_buffers
from trichord.samples.config import ImageConfig

SIZE = 32
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]}


def tower(name: str = "resnet18", options: dict = RESNET, **changes) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VisionConfig(name=name, options=options, **changes), ImageConfig(size=SIZE))


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize(
    ("name", "options", "grid", "width"),
    [
        ("resnet18", RESNET, (4, 4), 16),
        ("resnet18", {**RESNET, "norm_layer": "groupnorm1"}, (4, 4), 16),
        ("convnext_atto", CONVNEXT, (1, 1), 24),
        ("mobilenetv3_small_050", {}, (1, 1), 1024),
        ("regnetx_002", {}, (1, 1), 368),
    ],
)
def test_the_planned_grid_is_the_feature_map_in_reading_order(name, options, grid, width):
    made = tower(name, options).eval()
    assert image_grid(made.config, SIZE) == made.grid == grid
    pixels = pictures(2)
    tokens = made(pixels)
    assert tokens.shape == (2, grid[0] * grid[1], width) == (2, made.tokens_per_image, made.hidden_size)
    scaled = (pixels.float() / 255 - torch.tensor(made.mean)[:, None, None]) / torch.tensor(made.std)[:, None, None]
    features = made.backbone(scaled)
    assert torch.equal(tokens[1, -1], features[1, :, -1, -1])
    assert torch.equal(tokens[0, grid[1] - 1], features[0, :, 0, -1])


@pytest.mark.parametrize(
    ("name", "options", "size", "rows"),
    [("resnet18", RESNET, 33, 5), ("inception_v3", {}, 111, 2), ("convnext_atto", CONVNEXT, 64, 2)],
)
def test_a_map_over_the_whole_picture_is_right_at_any_size(name, options, size, rows):
    assert image_grid(VisionConfig(name=name, options=options), size) == (rows, rows)


@pytest.mark.parametrize(("size", "left_out"), [(100, 4), (111, 15), (127, 31)])
def test_a_map_that_leaves_pixels_outside_is_refused(size, left_out):
    with pytest.raises(ConfigError, match=f"is {size}, .* stride 32 .* last {left_out} rows .* set it to 96 or 128$"):
        image_grid(VisionConfig(name="convnext_atto", options=CONVNEXT), size)


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])  # torch's batch norm, and timm's with its activation
def test_on_one_rank_it_is_torch_s_batch_norm(name):
    options = RESNET if name == "resnet18" else {}
    made = tower(name, options)
    torch.manual_seed(0)
    theirs = create_backbone(made.config, SIZE).train()
    theirs.load_state_dict(made.backbone.state_dict(), strict=False)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    want = theirs(x)
    want.square().mean().backward()
    assert made.batch_items is not None
    with made.batch_items.of_call(None):
        got = made.backbone.train()(x)
    got.square().mean().backward()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for (key, ours), (_, other) in zip(made.backbone.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=2e-3, atol=2e-5 * float(other.grad.abs().max()), msg=key)
    buffers = dict(theirs.named_buffers())
    for key, buffer in stored_buffers(made.backbone).items():
        torch.testing.assert_close(buffer, buffers[key], rtol=1e-5, atol=1e-6)


def norm_of(channels: int = 3, frozen: bool = False) -> tuple[SharedBatchNorm, nn.BatchNorm2d]:
    plain = nn.BatchNorm2d(channels)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    holder = nn.Sequential(copy.deepcopy(plain))
    share_batch_norms(holder, frozen)
    return holder[0], plain.double()  # type: ignore[return-value]


def test_moments_far_from_zero_lose_nothing():
    norm, plain = norm_of()
    x = 1000 + torch.randn(4, 3, 5, 5)
    norm.items.recording = True
    torch.testing.assert_close(norm(x), plain(x.double()).float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(norm.running_var, plain.running_var.float(), rtol=1e-4, atol=0)


def test_placeholders_are_in_no_statistic_and_add_nothing_to_a_gradient():
    with_placeholder, without = tower(), tower()
    pixels = pictures(4)
    padded = torch.cat([pixels[:3], with_placeholder.placeholder(torch.device("cpu"))])
    got, want = with_placeholder(padded, 3)[:3], without(pixels[:3])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for made, out in ((with_placeholder, got), (without, want)):
        out.square().sum().backward()
        assert made.backbone.conv1.weight.grad is not None
    torch.testing.assert_close(
        with_placeholder.backbone.conv1.weight.grad, without.backbone.conv1.weight.grad, rtol=1e-3, atol=1e-3
    )
    for ours, theirs in zip(with_placeholder.buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_where_nobody_has_an_item_all_stays_finite_and_no_buffer_is_touched():
    made = tower()
    before = copy.deepcopy(stored_buffers(made))
    (made(made.placeholder(torch.device("cpu")), 0).sum() * 0.0).backward()
    assert all(bool((p.grad == 0).all()) for p in made.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in made.parameters()) == len(list(made.parameters()))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in stored_buffers(made).items())


def test_only_a_pass_that_keeps_its_graph_moves_the_statistics_and_does_so_once():
    made, once = tower(), tower()
    for block in ("layer1", "layer2", "layer3", "layer4"):
        recompute_blocks(list(getattr(made.backbone, block)), "full")
    pixels = pictures(3)
    with torch.no_grad():
        first = made(pixels)
    out = made(pixels)
    assert torch.equal(first, out), "both passes normalise by the same"
    out.square().sum().backward()
    expected = once(pixels)
    expected.square().sum().backward()
    for (name, ours), theirs in zip(stored_buffers(made).items(), stored_buffers(once).values(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(made.named_parameters(), once.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_numbers_that_are_not_finite_do_not_enter_the_statistics():
    norm, _ = norm_of()
    norm.items.recording = True
    norm(torch.full((2, 3, 2, 2), float("inf")))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    norm(torch.randn(2, 3, 2, 2))
    assert not torch.equal(norm.running_mean, torch.zeros(3))


@pytest.mark.parametrize("changes", [{"batch_stats": "frozen"}, {"freeze": True}])
def test_frozen_statistics_serve_in_training(changes):
    made = tower(**changes)
    assert not has_shared_statistics(made)
    assert has_shared_statistics(tower())
    before = copy.deepcopy(stored_buffers(made))
    pixels = pictures(3)
    trained = made(pixels)
    assert torch.equal(trained[:1], made(pixels[:1])), "a picture's features depend on the picture alone"
    assert torch.equal(trained, made.eval()(pixels))
    assert all(torch.equal(buffer, before[name]) for name, buffer in stored_buffers(made).items())
    trained.sum().backward()
    assert made.backbone.bn1.weight.grad.abs().sum() > 0


def test_statistics_stay_exact_when_the_model_is_cast():
    made = tower()
    made(pictures(2)).sum().backward()
    before = copy.deepcopy(stored_buffers(made))
    made.bfloat16()
    assert made.backbone.conv1.weight.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in stored_buffers(made).items())
    out = made(pictures(2))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert made.backbone.bn1.weight.grad.dtype == torch.bfloat16


def test_released_weights_with_their_statistics(tmp_path):
    released = timm.create_model("resnet18", num_classes=7, **RESNET).train()
    released(torch.randn(2, 3, SIZE, SIZE))
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    made = tower(weights=str(tmp_path))
    own = made.backbone.state_dict()
    assert "bn1.running_mean" in own
    assert "bn1.num_batches_tracked" not in own
    assert all(torch.equal(own[key], released.state_dict()[key]) for key in own)


def test_statistics_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match=r"0 \(BatchNorm2d\) keeps statistics of batches .* choose another"):
        share_batch_norms(nn.Sequential(nn.BatchNorm2d(3, momentum=None)), frozen=False)
    with pytest.raises(ConfigError, match=r"1.0 \(BatchNorm1d\)"):
        share_batch_norms(nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm1d(3))), frozen=True)
