"""timm vision transformers with our attention against the untouched ones: outputs, every gradient, names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from trichord.layers.vision import ImageAttention, swap_image_attention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
VARIANTS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "no_class_token": {"class_token": False, "global_pool": ""},
    "scale_norm": {"scale_attn_norm": True},
}


def build_pair(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    theirs = VisionTransformer(**SMALL, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = copy.deepcopy(theirs)
    assert swap_image_attention(ours) == 2
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_and_every_gradient(variant: str, recompute: bool) -> None:
    """Measured worst: tokens equal bit for bit, gradients 4.6e-7 of their largest entry."""
    ours, theirs = build_pair(**VARIANTS[variant])
    ours.set_grad_checkpointing(recompute)
    pixels = torch.randn(3, 3, 32, 32)
    tokens = [model.forward_features(pixels) for model in (ours, theirs)]
    torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(tokens[0])
    for result in tokens:
        (result * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert list(wanted) == [name for name, _ in ours.named_parameters()]
    # The bias of the key norm moves all scores of a query alike: its gradient is zero, and what is left is rounding.
    floor = 1e-7 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, parameter in ours.named_parameters():
        bound = max(floor, 1e-5 * wanted[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=bound, msg=name)


def test_names_and_parameters_stay() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    assert swap_image_attention(model) == 1
    assert swap_image_attention(model) == 0
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_gate_is_kept() -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    theirs = Attention(32, num_heads=4, qkv_bias=True, gated=True)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(ImageAttention(theirs)(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ImageAttention(theirs)(x, is_causal=True), theirs(x, is_causal=True))


def test_masks_and_dropout_are_refused() -> None:
    ours, _ = build_pair(attn_drop_rate=0.1)
    attention = ours.blocks[0].attn
    with pytest.raises(ValueError, match=r"expected dropout 0, got 0\.1"):
        attention(torch.zeros(1, 4, 32))
    attention.eval()(torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="expected no mask, got one"):
        attention(torch.zeros(1, 4, 32), attn_mask=torch.ones(1, 1, 4, 4))
