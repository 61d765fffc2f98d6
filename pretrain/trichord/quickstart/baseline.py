"""What the pictures give without any of this: a logistic regression on raw pixels, on the quick-start's own split."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

TRAIN = ("scans-train", "pairs-train")
HELD_OUT = "scans-heldout"


def pixel_baseline(data: Path) -> float:
    """Accuracy on the held-out scans of scikit-learn's LogisticRegression, trained on all training scans (0 to 1)."""
    from sklearn.linear_model import LogisticRegression

    train_x, train_y = _pixels_and_words(data, TRAIN)
    test_x, test_y = _pixels_and_words(data, (HELD_OUT,))
    return float(LogisticRegression(max_iter=2000).fit(train_x, train_y).score(test_x, test_y))


def read_scans(data: Path, source: str) -> Iterator[tuple[bytes, str]]:
    """(PNG bytes, word) of each scan of a source, read with the plain webdataset library."""
    shards = sorted(str(path) for path in data.glob(f"{source}-*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        yield sample["png"], sample["txt"].decode()


def _pixels_and_words(data: Path, sources: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    pixels, words = [], []
    for source in sources:
        for png, word in read_scans(data, source):
            # The scans are 8 x 8; the PNGs repeat each pixel.
            image = Image.open(io.BytesIO(png)).convert("L").resize((8, 8), Image.Resampling.BOX)
            pixels.append(np.asarray(image, dtype=np.float32).ravel() / 255)
            words.append(word)
    return np.stack(pixels), words
