"""The language-model head that returns the loss itself, so that the weight is used inside its owner's forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 2**25  # logits held at once, in numbers: 128 MiB in fp32


class LMHead(nn.Linear):
    """A linear map to the vocabulary. With labels it returns the summed cross-entropy instead of logits."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (..., D) -> logits (..., V); with labels (K,) int64 and hidden (K, D): () fp32, the sum over rows.

        Rows are taken in chunks that are recomputed in the backward pass, so that at most `_CHUNK_ELEMENTS` logits
        live at a time.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        rows = max(1, _CHUNK_ELEMENTS // self.out_features)
        if hidden.shape[0] <= rows:
            return self._loss_sum(hidden, labels)
        losses = [
            checkpoint(self._loss_sum, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(rows), labels.split(rows))
        ]
        return torch.stack(losses).sum()

    def _loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def replace_lm_head(model: Any) -> LMHead:
    """Put an `LMHead` in the place of `model.lm_head`; the Parameter is the same object, so tied weights stay tied."""
    old = model.lm_head
    head = LMHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight = old.weight
    head.bias = old.bias
    model.lm_head = head
    return head
