"""The order of the run's samples: the planner of its lanes, and what that order depends on."""

from __future__ import annotations

from typing import Any

from trichord.batches.windows import SamplePlanner
from trichord.core.log import get_logger
from trichord.samples.filters import FilteredSample
from trichord.shards.config import ShardsConfig
from trichord.shards.lanes import LanePlanner, LaneSource, SampleRef
from trichord.shards.quarantine import BadSample

_log = get_logger(__name__)
_SAMPLES_FOR_MEAN = 256
_MAX_TRIED = 4096


def lane_planner(shards: ShardsConfig, planner: SamplePlanner, seed: int) -> LanePlanner:
    """The planner of all lanes, as configured."""
    by_tokens = shards.weights_by == "tokens" and len(shards.sources) > 1
    sources = [
        LaneSource(
            shard_sizes=table.shard_sizes,
            weight=source.weight,
            schedule=source.weight_schedule,
            group=tuple(source.group.split("/")) if source.group else (),
            epochs=source.epochs,
            shards_at=table.shards_at if source.follow else None,
            tokens_per_sample=mean_tokens(planner, number) if by_tokens else 1.0,
        )
        for number, (source, table) in enumerate(zip(shards.sources, planner.tables))
    ]
    return LanePlanner(
        seed,
        sources,
        group_weights=shards.group_weights,
        num_lanes=planner.batches.num_lanes,
        window_samples=shards.window_samples,
    )


def mean_tokens(planner: SamplePlanner, source: int) -> float:
    """Mean stream tokens of the first 256 usable samples of a source, to three digits: the same on every process, and
    after a followed source has grown."""
    total = counted = 0
    for sample in range(min(planner.tables[source].samples_at(0), _MAX_TRIED)):
        try:
            total += planner.plan(SampleRef(source, 0, sample))[0].length
        except (BadSample, FilteredSample):
            continue
        counted += 1
        if counted == _SAMPLES_FOR_MEAN:
            break
    return float(f"{total / counted:.3g}") if counted else 1.0


def data_identity(shards: ShardsConfig, planner: SamplePlanner, seed: int) -> dict[str, Any]:
    """What the order of samples depends on, beside weights and epochs, which may change on resume. JSON types only."""
    batches = planner.batches
    return {
        "seed": seed,
        "rows_per_step": batches.rows_per_step,
        "num_lanes": batches.num_lanes,
        "row_tokens": batches.row_tokens,
        "packing": [batches.packing, batches.max_samples_per_row, batches.long_samples],
        "window_samples": shards.window_samples,
        "tokenizer": planner.tokenizer.fingerprint(),
        "sources": [[table.name, table.digest, keep.digest] for table, keep in zip(planner.tables, planner.filters)],
    }
