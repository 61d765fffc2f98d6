"""Draws the pictures in `masks/` from the attention's own visibility function: `python docs/kernels/plot_masks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from torch import Tensor

from trichord_kernels.reference.visibility import key_intervals

FOLDER = Path(__file__).parent / "masks"
NUM_TOKENS = 24
CU_SEQLENS = torch.tensor([0, 14, 22], dtype=torch.int32)  # two segments, then two rows of slack
CU_SEQLENS_K = torch.tensor([0, 6, 16], dtype=torch.int32)


def with_spans(*spans: tuple[int, int]) -> Tensor:
    """`span_ends` of a causal stream with these bidirectional spans [begin, end)."""
    ends = torch.arange(1, NUM_TOKENS + 1, dtype=torch.int32)
    for begin, end in spans:
        ends[begin:end] = end
    return ends


# Name of the picture -> options of `attention`; `cu_seqlens_k` makes it cross-attention.
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "spans": {"span_ends": with_spans((3, 8), (10, 13), (15, 19))},
    "prefix": {"span_ends": with_spans((0, 5), (14, 17))},
    "window": {"window": 4},
    "window_bidirectional": {"window": 4, "causal": False},
    "window_spans": {"window": 4, "span_ends": with_spans((3, 9), (15, 18))},
    "used_keys": {"seqused_k": torch.tensor([9, 0], dtype=torch.int32)},
    "cross": {"cu_seqlens_k": CU_SEQLENS_K, "causal": False},
    "cross_causal": {"cu_seqlens_k": CU_SEQLENS_K},
}


def visibility(options: dict[str, Any]) -> Tensor:
    """(queries, keys) int64: 1 where the query sees the key; 0 elsewhere."""
    num_keys = int(CU_SEQLENS_K[-1]) if "cu_seqlens_k" in options else NUM_TOKENS
    first, last = key_intervals(NUM_TOKENS, CU_SEQLENS, **options)
    keys = torch.arange(num_keys)
    return ((keys >= first[:, None]) & (keys < last[:, None])).long()


def draw(name: str, options: dict[str, Any]) -> Path:
    """One picture: rows are queries, columns keys; lines between segments. Returns its file."""
    seen = visibility(options)
    bounds_k = options.get("cu_seqlens_k", CU_SEQLENS)
    height = 2.4
    figure, axes = plt.subplots(figsize=(height * seen.shape[1] / seen.shape[0] + 0.4, height), layout="constrained")
    axes.pcolormesh(seen.numpy(), cmap=ListedColormap(["#f2f2f2", "#2f6fa8"]), edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    for bound in CU_SEQLENS[1:].tolist():
        axes.axhline(bound, color="black", linewidth=1)
    for bound in bounds_k[1:].tolist():
        axes.axvline(bound, color="black", linewidth=1)
    axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[], aspect="equal")
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.png"
    figure.savefig(file, dpi=80, metadata={"Software": None})  # the same bytes for the same picture
    plt.close(figure)
    return file


def main() -> None:
    mpl.use("agg")
    for name, options in KINDS.items():
        print(draw(name, options))


if __name__ == "__main__":
    main()
