"""Captions judged in one pass: would the model choose every token of the reference?

Greedy decoding says a text word for word if and only if the model, given the text so far, finds the text's next token
likeliest at each of its places, its end included. So a pass over the reference tells what decoding would, up to other
ways to write the same words, at the cost of one forward pass, and every rank makes as many passes as it has batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch
from trichord.batches.sequential import SequentialBatch

Choose = Callable[[PackedBatch, Tensor], Tensor]
"""(batch, positions (K,)) -> the likeliest next token (K,) int64 at each, on the CPU."""


def likeliest(logits: Tensor, vocab_size: int, never: Iterable[int]) -> Tensor:
    """logits (K, V) -> (K,) int64 on the CPU, of the tokens that may be said: the tokenizer's, but for `never`."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64)
    allowed = logits[:, :vocab_size].float()
    allowed[:, sorted(set(never))] = -torch.inf
    return allowed.argmax(dim=1).cpu()


def captions_chosen(choose: Choose, batches: Iterable[SequentialBatch], device: torch.device) -> list[tuple[bool, str]]:
    """(all tokens right, reference) of each sample with text; `batches` must hold the given modality alone."""
    found = []
    for item in batches:
        batch = item.batch
        right = choose(batch.to(device), batch.label_index.to(device)) == batch.labels[batch.label_index]
        segments = batch.segment_ids[batch.label_index].long()
        with_item = {*batch.image_segments.tolist(), *batch.audio_segments.tolist()}
        for number, sample in enumerate(item.decoded):
            own = right[segments == number]
            if number in with_item and sample.text and len(own):
                found.append((bool(own.all()), sample.text))
    return found
