"""The language-model head that returns the loss itself, so that the weight is used inside its owner's forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trichord_kernels import linear_cross_entropy

_IGNORE_INDEX = -100


class LMHead(nn.Linear):
    """A linear map to the vocabulary. With labels it returns the summed loss instead of logits.

    label_smoothing, z_loss: parts of the loss in training; in eval mode it is the plain cross-entropy.
    softcap: logits are softcap * tanh(logits / softcap) (Gemma 2); None: as they are.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """hidden (..., D) -> logits (..., V); with labels (K,) int64 and hidden (K, D): () fp32, the sum over rows, or
        with reduction `none` (K,) fp32.

        Logits of the loss live a chunk at a time and are computed again in the backward pass.
        """
        if labels is None:
            logits = F.linear(hidden, self.weight, self.bias)
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            self.bias,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
            softcap=self.softcap,
            reduction=reduction,
        )


def replace_lm_head(model: Any) -> LMHead:
    """Put an `LMHead` in the place of `model.lm_head`; the Parameter is the same object, so tied weights stay tied.

    A cap that the model's config asks of its logits is the head's from here on.
    """
    old = model.lm_head
    head = LMHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight = old.weight
    head.bias = old.bias
    head.softcap = getattr(model.config, "final_logit_softcapping", None)
    model.lm_head = head
    return head


def next_token_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the next token, as transformers' `ForCausalLMLoss`: the mean over labelled tokens, or the sum
    divided by `num_items` where a trainer gives the count of all its micro-batches. hidden (B, L, D), labels (B, L).
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=_IGNORE_INDEX)[..., 1:]
    targets = shift_labels.flatten().to(hidden.device)
    total = head(hidden.flatten(0, -2), targets)
    if num_items is None:
        num_items = (targets != _IGNORE_INDEX).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
