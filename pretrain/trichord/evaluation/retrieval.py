"""Retrieval: is one of the k nearest targets the same item?"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Recall:
    """value: share of queries with a right target among the k nearest; chance: the same for a random order."""

    value: float
    chance: float
    queries: int


def recall_at_k(query: Tensor, target: Tensor, query_groups: Tensor, target_groups: Tensor, k: int) -> Recall:
    """query (Q, E), target (T, E): L2-normalised embeddings; groups (Q,), (T,) int64: equal for the same item.

    Ties are broken by the target's place in the gallery. Queries without a right target in the gallery are left out,
    as no model could find one.
    """
    right = query_groups[:, None] == target_groups[None, :]
    answerable = right.any(dim=1)
    query, right = query[answerable], right[answerable]
    if not len(query):
        return Recall(math.nan, math.nan, 0)
    k = min(k, len(target))
    nearest = (query @ target.T).argsort(dim=1, descending=True, stable=True)[:, :k]
    hits = right.gather(1, nearest).any(dim=1)
    chance = sum(_chance(len(target), int(n), k) for n in right.sum(dim=1)) / len(query)
    return Recall(float(hits.float().mean()), chance, len(query))


def _chance(targets: int, right: int, k: int) -> float:
    """Probability that k random targets hold at least one of the right ones."""
    return 1.0 - math.comb(targets - right, k) / math.comb(targets, k)


def majority_share(texts: list[str]) -> float:
    """What always giving the most frequent answer would score."""
    return Counter(texts).most_common(1)[0][1] / len(texts) if texts else math.nan
