"""What the operands of the contrastive loss must be, and which slots are positives of each other or not in use.

Both paths, plain torch and Triton, refuse the same mistakes with the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("infonce", "sigmoid")


@dataclass(frozen=True)
class Slots:
    """Groups (int64) and validity (bool) of the queries (R,) and targets (C,), as given; None: own slot, all valid."""

    query_groups: Tensor | None
    target_groups: Tensor | None
    query_valid: Tensor | None
    target_valid: Tensor | None

    def check(self, num_queries: int, num_targets: int, over_ranks: bool) -> None:
        """Raise ValueError unless everything given has its shape and dtype."""
        if (self.query_groups is None) != (self.target_groups is None):
            given = "target_groups" if self.query_groups is None else "query_groups"
            raise ValueError(f"contrastive_loss: expected groups of both sides or of none, got {given} only; give both")
        if over_ranks and self.query_groups is None and num_queries != num_targets:
            raise ValueError(
                "contrastive_loss: expected as many queries as targets where a process group and no groups are given, "
                f"got {num_queries} and {num_targets}; give query_groups and target_groups"
            )
        for name, tensor, length, dtype in (
            ("query_groups", self.query_groups, num_queries, torch.int64),
            ("target_groups", self.target_groups, num_targets, torch.int64),
            ("query_valid", self.query_valid, num_queries, torch.bool),
            ("target_valid", self.target_valid, num_targets, torch.bool),
        ):
            if tensor is not None and (tensor.shape != (length,) or tensor.dtype != dtype):
                raise ValueError(
                    f"contrastive_loss: expected {name} of shape ({length},) and {dtype}, got {tuple(tensor.shape)} "
                    f"{tensor.dtype}; one entry per row of its features"
                )

    def without_unused(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The features with 0 in slots that are not valid, whatever they hold (NaN, too); their gradient is then 0."""
        if self.query_valid is not None:
            queries = queries.masked_fill(~self.query_valid[:, None], 0)
        if self.target_valid is not None:
            targets = targets.masked_fill(~self.target_valid[:, None], 0)
        return queries, targets

    def ids(self, num_queries: int, num_targets: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 ids (R,) and (C,), equal where the groups are (else the slots); -1 and -2 where not valid.

        No host read: groups are numbered by sorting them.
        """
        if self.query_groups is None or self.target_groups is None:
            query_ids = torch.arange(num_queries, device=device, dtype=torch.int32)
            target_ids = torch.arange(num_targets, device=device, dtype=torch.int32)
        else:
            numbers = _numbered(torch.cat([self.query_groups, self.target_groups]))
            query_ids, target_ids = numbers[:num_queries].clone(), numbers[num_queries:].clone()
        if self.query_valid is not None:
            query_ids = query_ids.masked_fill(~self.query_valid, -1)
        if self.target_valid is not None:
            target_ids = target_ids.masked_fill(~self.target_valid, -2)
        return query_ids, target_ids


def _numbered(groups: Tensor) -> Tensor:
    """int32 numbers from 0 on, equal where the int64 groups are."""
    values, order = groups.sort()
    is_new = torch.ones_like(values, dtype=torch.bool)
    is_new[1:] = values[1:] != values[:-1]
    numbers = torch.empty_like(values, dtype=torch.int32)
    numbers[order] = is_new.cumsum(0, dtype=torch.int32) - 1
    return numbers


def check_operands(
    queries: Tensor, targets: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, kind: str, has_columns: bool
) -> None:
    """Raise ValueError unless features, scalars and kind fit together."""
    if kind not in KINDS:
        raise ValueError(f"contrastive_loss: expected kind {' or '.join(KINDS)}, got {kind!r}; name one of them")
    if queries.dim() != 2 or targets.dim() != 2 or queries.shape[1] != targets.shape[1] or not queries.shape[1]:
        raise ValueError(
            "contrastive_loss: expected queries (R, E) and targets (C, E) with the same E of at least 1, got "
            f"{tuple(queries.shape)} and {tuple(targets.shape)}; a row per item"
        )
    if queries.dtype != targets.dtype or not queries.dtype.is_floating_point:
        raise ValueError(
            f"contrastive_loss: expected features of one floating dtype, got {queries.dtype} and {targets.dtype}; cast"
        )
    if has_columns and queries.shape[0] != targets.shape[0]:
        raise ValueError(
            "contrastive_loss: expected as many targets as queries in the symmetric loss (row i of both is one "
            f"sample), got {queries.shape[0]} queries and {targets.shape[0]} targets; set symmetric=False"
        )
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is not None and scalar.shape not in ((), (1,)):
            raise ValueError(
                f"contrastive_loss: expected {name} of shape () or (1,), got {tuple(scalar.shape)}; one learned scalar"
            )
