"""The export at work: loaded by transformers alone, it captions scans it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trichord.quickstart.baseline import HELD_OUT, read_scans


def caption_scans(export: Path, data: Path, count: int) -> list[dict[str, str]]:
    """[{"said", "is"}] for the first `count` held-out scans, through `AutoModelForImageTextToText.from_pretrained`."""
    import io

    from transformers import AutoModelForImageTextToText, AutoTokenizer

    import trichord.fusion.hf  # noqa: F401  registers the model type

    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    size = model.config.samples["image"]["size"]
    scans = [scan for scan, _ in zip(read_scans(data, HELD_OUT), range(count))]
    pixels: list[torch.Tensor | None] = []
    for png, _ in scans:
        image = Image.open(io.BytesIO(png)).convert("RGB").resize((size, size))
        pixels.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    inputs = model.prepare_prompts(pixels, [None] * len(pixels))  # pyright: ignore[reportCallIssue]  our class
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [{"said": text.strip(), "is": word} for text, (_, word) in zip(said, scans)]
