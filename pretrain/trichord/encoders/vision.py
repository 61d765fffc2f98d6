"""The vision tower: a timm model that turns normalised pixels into feature tokens.

Of a vision transformer these are its patch tokens, of a convolutional network the pixels of its last feature map.
"""

from __future__ import annotations

import difflib
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.encoders.config import VisionConfig
from trichord.encoders.weights import load_into, needs_no_weights, read_safetensors
from trichord.layers.batch_norm import share_batch_norms
from trichord.samples.config import ImageConfig

log = get_logger(__name__)

# Parts of released timm checkpoints that come after the tokens; we use the tokens themselves.
_BEYOND_TOKENS = ("attn_pool.", "head.", "fc_norm.", "head_dist.", "fc.", "classifier.")


def create_backbone(config: VisionConfig, image_size: int) -> Any:
    """The timm model, an nn.Module, without pooling and classifier, so that calling it returns all tokens, or the map.

    Calling the module itself (not its `forward_features`) matters: class token and position embedding belong to it,
    and ZeRO-3 gathers them when it is called.

    Raises:
        ConfigError: no such model, options it does not take, or an `img_size` other than the pictures'.
    """
    import timm

    options = {"img_size": image_size, **config.options}
    if options["img_size"] not in (image_size, (image_size, image_size), [image_size, image_size]):
        raise ConfigError(
            f"encoders.vision.options.img_size is {options['img_size']}, but samples.image.size is {image_size}; "
            "leave img_size out, it follows samples.image.size"
        )
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.4)
        raise ConfigError(
            f"encoders.vision.name {config.name!r} is no timm model; nearest: {', '.join(near) or 'none'}"
        )
    fixed = {"pretrained": False, "num_classes": 0, "global_pool": ""}
    try:
        try:
            return timm.create_model(config.name, **fixed, **options)
        except TypeError as error:  # a convolutional network takes pictures of any size, and is told none
            if "'img_size'" not in str(error) or "img_size" in config.options:
                raise
            return timm.create_model(config.name, **fixed, **config.options)
    except (TypeError, AssertionError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"timm cannot build {config.name!r} with options {options}: {error}") from error


def patch_grid(backbone: Any, config: VisionConfig, image_size: int) -> tuple[int, int]:
    """Rows and columns of its patch tokens, or of its last feature map.

    Raises:
        ConfigError: the model returns neither, or its patches or map do not fill the picture.
    """
    if is_vision_transformer(backbone):
        _require_whole_patches(backbone, config, image_size)
        rows, columns = backbone.patch_embed.grid_size
        return int(rows), int(columns)
    _, rows, columns = feature_map(config, image_size)
    return rows, columns


def is_vision_transformer(backbone: Any) -> bool:
    """Whether it returns prefix tokens and a grid of patch tokens."""
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    return grid is not None and hasattr(backbone, "num_prefix_tokens")


def feature_map(config: VisionConfig, image_size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of a convolutional network's output, by running one picture through its shapes.

    Raises:
        ConfigError: it returns no feature map (C, H, W), or one that does not fill the picture.
    """
    with torch.device("meta"):
        twin = create_backbone(config, image_size).eval()
    shape = _output_shape(twin, config, image_size)
    channels = {twin.num_features, getattr(twin, "head_hidden_size", twin.num_features)}
    if len(shape) != 4 or shape[1] not in channels or getattr(twin, "output_fmt", "NCHW") != "NCHW":
        raise ConfigError(
            f"encoders.vision.name {config.name!r} ({type(twin).__name__}) returns neither a sequence of patch tokens "
            f"nor a feature map (C, H, W), but {shape[1:]}; choose a plain vision transformer, such as "
            "vit_base_patch16_224, or a convolutional network, such as resnet50 or convnext_base"
        )
    _require_whole_map(twin, config, image_size, shape[2])
    return shape[1], shape[2], shape[3]


def _output_shape(twin: nn.Module, config: VisionConfig, image_size: int) -> tuple[int, ...]:
    """Of one picture; twin: the model on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad():
            return tuple(twin(torch.empty(1, 3, image_size, image_size)).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"encoders.vision.name {config.name!r} cannot run on pictures of {image_size} x {image_size} pixels: "
            f"{error}; change samples.image.size or its options"
        ) from error


def _require_whole_map(twin: Any, config: VisionConfig, image_size: int, rows: int) -> None:
    """Raise where a convolutional network leaves the last rows and columns of pixels outside its map.

    Those that pad before each stride (ResNet) fill a picture of any size, those that divide it into patches (ConvNeXt)
    do not. Some (Inception) have a smaller map at every size, as they never pad: their kernels see all pixels.
    """
    stride = twin.feature_info[-1]["reduction"] if getattr(twin, "feature_info", None) else 1
    left_out, whole = image_size - rows * stride, image_size - image_size % stride
    released_sizes = [twin.pretrained_cfg.get(name, (0,))[-1] for name in ("input_size", "test_input_size")]
    if left_out <= 0 or whole == image_size or image_size in released_sizes:
        return
    if _output_shape(twin, config, whole)[2] * stride < whole:
        return
    raise ConfigError(
        f"samples.image.size is {image_size}, no multiple of the stride {stride} of {config.name!r}: the last "
        f"{left_out} rows and columns of pixels would be outside its feature map; set it to {whole} or {whole + stride}"
    )


def _require_whole_patches(backbone: Any, config: VisionConfig, image_size: int) -> None:
    """Raise where timm would leave out the last rows and columns of pixels without a word.

    A model at the size it was released for may do so: SigLIP's so400m/14 was trained at 384 on 27 x 14 = 378 of them.
    """
    patch_size = math.lcm(*backbone.patch_embed.patch_size)
    left_out = image_size % patch_size
    released_size = backbone.pretrained_cfg.get("input_size", (0,))[-1]
    if not left_out or (image_size == released_size and "patch_size" not in config.options):
        return
    sizes = [size for size in (image_size - left_out, image_size - left_out + patch_size) if size]
    raise ConfigError(
        f"samples.image.size is {image_size}, no multiple of the patch size {patch_size} of {config.name!r}: the last "
        f"{left_out} rows and columns of pixels would never be seen; set it to {' or '.join(map(str, sizes))}"
    )


class VisionTower(nn.Module):
    """Pixels -> feature tokens, one per patch or per pixel of the last map; class and register tokens are dropped."""

    def __init__(self, config: VisionConfig, image: ImageConfig):
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config, image.size)
        self.grid = patch_grid(self.backbone, config, image.size)
        self.image_size = image.size
        self.returns_map = not is_vision_transformer(self.backbone)
        self.hidden_size = feature_map(config, image.size)[0] if self.returns_map else int(self.backbone.num_features)
        self.num_prefix_tokens = 0 if self.returns_map else int(self.backbone.num_prefix_tokens)
        self.mean, self.std = image.mean, image.std
        # A tower that does not learn is the same function in every step.
        self.batch_items = share_batch_norms(self.backbone, config.freeze or config.batch_stats == "frozen")
        if config.weights and not needs_no_weights(self):
            _load_weights(self.backbone, config.weights)

    @property
    def tokens_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Tensor, num_real: int | None = None) -> Tensor:
        """pixels (I, 3, S, S) uint8 -> (I, P, D), P = rows * columns in reading order.

        num_real: how many of them, from the first on, are no placeholders; None: all.
        """
        dtype = next(self.backbone.parameters()).dtype
        # Channel by channel with host numbers: a tensor of means would be a copy from the host in each step.
        scaled = [(pixels[:, c].float() / 255.0 - mean) / std for c, (mean, std) in enumerate(zip(self.mean, self.std))]
        with self.batch_items.of_call(num_real) if self.batch_items is not None else nullcontext():
            features = self.backbone(torch.stack(scaled, dim=1).to(dtype))
        return features.flatten(2).transpose(1, 2) if self.returns_map else features[:, self.num_prefix_tokens :]

    def placeholder(self, device: torch.device) -> Tensor:
        """One grey image (1, 3, S, S) uint8, for a micro-batch without any."""
        return torch.full((1, 3, self.image_size, self.image_size), 128, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def refill_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds (rotary tables) anew; after a build on the meta device they are
        empty."""
        with torch.device("cpu"):
            fresh = create_backbone(self.config, self.image_size).float()
        kept = fresh.state_dict().keys()
        for name, buffer in fresh.named_buffers():
            if name not in kept:
                owner, _, leaf = name.rpartition(".")
                module = self.backbone.get_submodule(owner)
                module._buffers[leaf] = buffer.to(module._buffers[leaf].device)


def _load_weights(backbone: nn.Module, path: str) -> None:
    weights = read_safetensors(path)
    own = backbone.state_dict().keys()
    dropped = [key for key in weights if key.startswith(_BEYOND_TOKENS) and key not in own]
    if dropped:
        log.info("encoders.vision.weights: not used, as they follow the tokens: %s", ", ".join(dropped))
    # Nothing depends on how many batches a running mean has seen.
    left_out = {*dropped, *(key for key in weights if key.endswith(".num_batches_tracked") and key not in own)}
    load_into(backbone, weights.renamed(lambda key: None if key in left_out else key), path)
