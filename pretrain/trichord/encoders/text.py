"""Text towers: the caption tokens of each segment -> one feature vector per segment.

Shapes: T stream tokens, S segments, L the longest caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trichord.encoders.config import TextEncoderConfig
from trichord.encoders.padding import key_mask, masked_mean
from trichord.encoders.transformer import Transformer


class TextTower(nn.Module):
    """`mean`: the mean of token embeddings. `transformer`: embeddings and learned positions, blocks, then the mean.

    Captions longer than `max_tokens` are read up to there, as CLIP does; the trunk reads them whole.
    """

    def __init__(self, config: TextEncoderConfig, vocab_size: int):
        super().__init__()
        self.max_tokens = config.max_tokens
        self.hidden_size = config.hidden_size
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.positions: nn.Embedding | None = None
        self.transformer: Transformer | None = None
        if config.kind == "transformer":
            self.positions = nn.Embedding(config.max_tokens, config.hidden_size)
            self.transformer = Transformer(config.hidden_size, config.num_layers, config.num_heads)
        for table in (self.embedding, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor, starts: Tensor, lengths: Sequence[int]) -> Tensor:
        """input_ids (T,), starts (S,) on the device, lengths: S host ints, S >= 1 -> (S, D) fp32.

        A segment without text gives finite numbers without meaning: mask them.
        """
        lengths = [min(length, self.max_tokens) for length in lengths]
        longest = max(1, max(lengths))
        offsets = torch.arange(longest, device=input_ids.device)
        index = (starts.long()[:, None] + offsets).clamp(max=input_ids.shape[0] - 1)
        hidden = self.embedding(input_ids[index])  # (S, L, D)
        if self.transformer is not None and self.positions is not None:
            hidden = self.transformer(hidden + self.positions(offsets), key_mask(lengths, longest, hidden.device))
        return masked_mean(hidden, [max(1, length) for length in lengths])
