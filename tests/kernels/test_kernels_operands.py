"""Slips that any user makes are told in words, by every op, before a number is computed from them."""

import pytest
import torch
from torch import Tensor

from trichord_kernels import (
    attention,
    contrastive_loss,
    fuse_modalities,
    gated_cross_attention,
    linear_cross_entropy,
    merge_embeddings,
    rms_norm,
    rope,
)

X, W = torch.ones(4, 8), torch.ones(8)
Q, CU = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
LABELS, FREQ = torch.zeros(4, dtype=torch.int64), torch.ones(4)
ONE, META, NAN = torch.ones(1), {"device": "meta"}, float("nan")


def gated(**changed) -> Tensor:
    operands = {"hidden": Q, "q": Q, "k": Q, "v": Q, "gate": ONE, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    return gated_cross_attention(**{**operands, **changed})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention(Q, Q, Q, [0, 4]), "cu_seqlens_q to be a tensor, got list"),
        (lambda: attention(Q, Q, Q, None), "cu_seqlens_q to be a tensor, got NoneType"),
        (lambda: attention(Q, Q, Q, CU, scale=0.0), "scale to be a number above 0, got 0.0"),
        (lambda: attention(Q, Q, Q, CU, scale=-1.0), "scale to be a number above 0"),
        (lambda: attention(Q, Q, Q, CU, softcap=NAN), "softcap to be a number above 0, got nan"),
        (lambda: attention(Q, Q, Q, CU, window=1.5), "window to be a whole number, got 1.5"),
        (lambda: attention(Q[..., :0], Q[..., :0], Q[..., :0], CU), "expected q"),
        (lambda: gated(gate=0.5), "gate to be a tensor, got float"),
        (lambda: gated(scale=NAN), "scale to be a number above 0"),
        (lambda: fuse_modalities((X, None)), r"inputs\[1\] to be a tensor, got NoneType"),
        (lambda: fuse_modalities((X, X), (0.5, 0.5)), r"weights\[0\] to be a tensor, got float"),
        (lambda: fuse_modalities((X.long(), X.long())), "in float32, bfloat16 or float16, got torch.int64"),
        (lambda: fuse_modalities((X,), norm="rms", norm_weight=W, eps=-1.0), "eps to be a number of at least 0"),
        (lambda: linear_cross_entropy(X, X, [0] * 4), "labels to be a tensor, got list"),
        (lambda: linear_cross_entropy(X.long(), X.long(), LABELS), "hidden in float32"),
        (lambda: linear_cross_entropy(X, torch.ones(5, 8, **META), LABELS), "one device, got hidden on cpu, weight on"),
        (lambda: linear_cross_entropy(X, X, LABELS, z_loss=-1.0), "z_loss to be a number of at least 0"),
        (lambda: linear_cross_entropy(X, X, LABELS, softcap=NAN), "softcap to be a number above 0"),
        (lambda: linear_cross_entropy(X, X, LABELS, ignore_index=None, num_labelled=6.5), "num_labelled to be a whole"),
        (lambda: contrastive_loss(X, X, 10.0), "logit_scale to be a tensor, got float"),
        (lambda: contrastive_loss(X, X, torch.ones((), **META)), "on one device"),
        (lambda: rms_norm(X, None), "weight to be a tensor"),
        (lambda: rms_norm(X, W, X), "eps to be a number of at least 0, got Tensor"),
        (lambda: rms_norm(X.long(), W), "x in float32"),
        (lambda: rms_norm(X, torch.ones(8, **META)), "on one device"),
        (lambda: rope(Q, Q, torch.arange(4), FREQ, eps=-1.0), "eps to be a number"),
        (lambda: rope(Q.long(), Q.long(), torch.arange(4), FREQ), "q in float32"),
        (lambda: rope(Q, Q, torch.arange(4), FREQ, attention_scaling=NAN), "attention_scaling to be a number above 0"),
        (lambda: merge_embeddings(X, X, [0, 1, 2, 3]), "positions to be a tensor, got list"),
        (lambda: merge_embeddings(X, X, torch.arange(4, **META)), "on one device"),
    ],
)
def test_a_slip_is_told(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_scalars_without_axes_are_weights_too():
    half = torch.tensor(0.5, requires_grad=True)
    out = fuse_modalities((X, X), (half, half))
    assert torch.equal(out, X)
    out.sum().backward()
    assert half.grad == 64
    assert half.grad.shape == ()


def test_the_meta_device_gives_shapes():
    x, q = X.to("meta"), Q.to("meta")
    assert rms_norm(x, W.to("meta")).shape == (4, 8)
    assert fuse_modalities((x, x), norm="rms", norm_weight=W.to("meta")).shape == (4, 8)
    assert merge_embeddings(x, x[:1], torch.zeros(1, dtype=torch.int64, device="meta")).shape == (4, 8)
    assert contrastive_loss(x, x, torch.ones((), **META)).shape == ()
    assert attention(q, q, q, CU.to("meta")).shape == (4, 2, 8)
    assert rope(q, q, torch.arange(4, **META), FREQ.to("meta"))[0].shape == (4, 2, 8)
