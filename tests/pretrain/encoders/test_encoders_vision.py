"""Vision towers: planned grids, names and options that do not exist, weights from disk."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from trichord.core.errors import ConfigError
from trichord.encoders.config import VisionConfig
from trichord.encoders.lengths import image_grid
from trichord.encoders.vision import VisionTower
from trichord.samples.config import ImageConfig

OPTIONS = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def leaf(name: str = "vit_tiny_patch16_224", **changes) -> VisionConfig:
    return VisionConfig(name=name, options={**OPTIONS, **changes.pop("options", {})}, **changes)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"]
)
def test_the_planned_grid_is_what_the_tower_yields(name):
    tower = VisionTower(leaf(name), ImageConfig(size=40))
    rows, columns = image_grid(leaf(name), 40)
    assert (rows, columns) == (5, 5) == tower.grid
    assert tower(tower.placeholder(torch.device("cpu"))).shape == (1, rows * columns, 32)


def test_the_planned_grid_agrees_with_full_size_models():
    assert image_grid(VisionConfig(name="vit_so400m_patch14_siglip_384"), 384) == (27, 27)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VisionConfig(name="vit_tiny_patch16_242"), "is no timm model; nearest: vit_tiny_patch16_224"),
        (leaf(options={"embed_dimm": 3}), "cannot build .* with options .*embed_dimm"),
        (leaf(options={"img_size": 48}), "img_size is 48, but samples.image.size is 32"),
        (VisionConfig(name="resnet18", options={"img_size": 32}), "cannot build 'resnet18'"),
        (VisionConfig(name="swin_tiny_patch4_window7_224"), "nor a feature map .C, H, W., but .1, 1, 768.; choose"),
        (VisionConfig(name="xcit_nano_12_p16_224"), "neither a sequence of patch tokens nor a feature map"),
        (VisionConfig(name="resnet18", options={"norm_layer": "no_norm"}), "cannot build 'resnet18'"),
    ],
)
def test_what_cannot_be_built_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        image_grid(config, 32)


@pytest.mark.parametrize(
    ("size", "config", "sizes"),
    [
        (35, leaf(), "patch size 8 .*the last 3 rows and columns .* set it to 32 or 40$"),
        (6, leaf(), "set it to 8$"),
        (300, VisionConfig(name="vit_so400m_patch14_siglip_384"), "size is 300, .* patch size 14 .* 294 or 308$"),
        (224, leaf(options={"patch_size": 20}), "set it to 220 or 240$"),
    ],
)
def test_pictures_that_patches_do_not_fill_are_refused(size, config, sizes):
    with pytest.raises(ConfigError, match=sizes):
        image_grid(config, size)
    with torch.device("meta"), pytest.raises(ConfigError, match=sizes):
        VisionTower(config, ImageConfig(size=size))


def test_weights_from_a_file_are_exact_and_what_follows_the_tokens_is_left_out(tmp_path):
    name = "vit_base_patch16_siglip_224"
    torch.manual_seed(0)
    released = timm.create_model(name, num_classes=7, img_size=32, **OPTIONS)
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        tower = VisionTower(leaf(name, weights=str(path)), ImageConfig(size=32))
        own = tower.backbone.state_dict()
        assert own
        assert all(torch.equal(own[key], released.state_dict()[key]) for key in own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 64}, r"\(1, 17, 64\) in the file, \(1, 17, 32\) here"),
        ({"depth": 2}, r"0 missing \[\], 12 unexpected \['blocks.1"),
        ({"qkv_bias": False}, r"1 missing \['blocks.0.attn.qkv.bias'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, message):
    released = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **{**OPTIONS, **changes})
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        VisionTower(leaf(weights=str(tmp_path)), ImageConfig(size=32))


def test_missing_and_pickled_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        VisionTower(leaf(weights=str(tmp_path / "no")), ImageConfig(size=32))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights"):
        VisionTower(leaf(weights=str(tmp_path)), ImageConfig(size=32))
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="cannot read weights"):
        VisionTower(leaf(weights=str(tmp_path)), ImageConfig(size=32))


def test_the_meta_device_reads_no_weights():
    with torch.device("meta"):
        VisionTower(leaf(weights="/nowhere"), ImageConfig(size=32))
