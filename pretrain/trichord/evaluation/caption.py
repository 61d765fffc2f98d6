"""Captioning: what the model says of an image or a clip, word for word against the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from trichord.batches.sequential import SequentialBatch
from trichord.batches.tokenizer import TextTokenizer
from trichord.fusion.hf import TrichordForConditionalGeneration
from trichord.samples.sample import DecodedSample


@torch.no_grad()
def caption_source(
    generator: TrichordForConditionalGeneration,
    tokenizer: TextTokenizer,
    batches: Iterable[SequentialBatch],
    context: Literal["image", "audio"],
    max_new_tokens: int,
) -> list[tuple[str, str]]:
    """(generated, reference) of every sample that has text and the context; greedy, white space and case folded.

    The model sees the context alone: of a sample with both, the other modality is left out.
    """
    pairs = []
    for item in batches:
        samples = [sample for sample in item.decoded if sample.text and _context(sample, context) is not None]
        if samples:
            texts = caption_samples(generator, tokenizer, samples, context, max_new_tokens)
            pairs += [(normalise(text), normalise(sample.text or "")) for text, sample in zip(texts, samples)]
    return pairs


@torch.no_grad()
def caption_samples(
    generator: TrichordForConditionalGeneration,
    tokenizer: TextTokenizer,
    samples: list[DecodedSample],
    context: Literal["image", "audio"],
    max_new_tokens: int,
) -> list[str]:
    """What the model says of each sample's image or clip."""
    nothing = [None] * len(samples)
    items = [torch.from_numpy(_context(sample, context)) for sample in samples]
    pixels, waveforms = (items, nothing) if context == "image" else (nothing, items)
    inputs = generator.prepare_prompts(pixels, waveforms)
    tokens = generator.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row) for row in new.tolist()]


def normalise(text: str) -> str:
    """For comparison: lower case, single spaces."""
    return " ".join(text.lower().split())


def _context(sample: DecodedSample, context: str):
    return sample.pixels if context == "image" else sample.waveform
