"""Where a run stands, and whether it may go on: too much bad data, no data, steps that are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import StepBatch
from trichord.checkpoints.load import LoadedState
from trichord.config.identity import run_path
from trichord.config.run import RunConfig
from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.engine.step import StepResult
from trichord.engine.together import decide_on_rank_0, gather_lists
from trichord.shards.quarantine import QuarantineLog, check_bad_fraction, is_too_bad
from trichord.tracking.recorder import Recorder

log = get_logger(__name__)

MAX_EMPTY_STEPS = 10
MAX_SUSPECTS = 64


@dataclass
class Progress:
    """Where the run stands: equal on all ranks, part of every checkpoint."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    filtered_samples: int = 0
    skipped_in_a_row: int = 0
    empty_in_a_row: int = 0
    rewinds: int = 0
    rewound_to: int | None = None  # until a step is finite again

    @classmethod
    def after(cls, resumed: LoadedState | None) -> Progress:
        return cls(**resumed.train_state["progress"]) if resumed is not None else cls()

    def advance(self, result: StepResult) -> None:
        self.step += 1
        self.tokens_seen += int(result.counts["useful_tokens"])
        self.samples_seen += int(result.counts["samples"])
        self.bad_samples += int(result.counts["bad_samples"])
        self.filtered_samples += int(result.counts["filtered"])
        if not result.is_empty:  # nothing was computed: it says nothing of the weights
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            self.rewound_to = self.rewound_to if result.skipped else None
        self.empty_in_a_row = 0 if result.counts["samples"] else self.empty_in_a_row + 1

    @property
    def is_finite(self) -> bool:
        """The last step was, with the weights that the run now has."""
        return not self.skipped_in_a_row and self.rewound_to is None

    def check(self, config: RunConfig, batch: StepBatch, result: StepResult, recorder: Recorder) -> None:
        """Stop the run when too much data is bad or there is none, and say which step was not finite; the same on all
        ranks.

        Raises:
            DataError: with the worst shards of the whole run; or the sources have no usable sample, or none for long.
        """
        seen = self.samples_seen + self.bad_samples
        if is_too_bad(self.bad_samples, seen, config.shards):
            quarantine = QuarantineLog(run_path(config) / "quarantine.jsonl")
            decide_on_rank_0(
                lambda: check_bad_fraction(self.bad_samples, seen, config.shards, quarantine.read(self.step))
            )
        used_up = not result.counts["open_lanes"]
        if (used_up and not self.samples_seen) or (not used_up and self.empty_in_a_row >= MAX_EMPTY_STEPS):
            raise DataError(
                f"the last {self.empty_in_a_row} steps held not one sample{', and all sources are used up' * used_up}; "
                f"so far {self.samples_seen} were used, filters and batches.long_samples left out "
                f"{self.filtered_samples}, {self.bad_samples} were bad; `trichord data preview` says why"
            )
        if self.skipped_in_a_row:
            suspects = suspects_of(result, batch)
            if dist.get_rank() == 0:
                log.warning(
                    "step %d is skipped, its loss or gradient is not finite%s; its samples: `trichord provenance %s "
                    "--step %d`",
                    *(self.step, told_ranks(suspects["ranks_with_bad_loss"]), run_path(config), self.step),
                )
            recorder.event("skipped_step", self.step, **suspects)

    def went_back(self, step: int) -> None:
        """To the weights of a checkpoint, see `train.rewind`."""
        self.rewinds, self.rewound_to, self.skipped_in_a_row = self.rewinds + 1, step, 0


def suspects_of(result: StepResult, batch: StepBatch) -> dict[str, Any]:
    """Which ranks' own loss was not finite in a skipped step, and the samples they had; where it was finite on all,
    only the gradient was not, and samples of all ranks are named. Called on every rank; reads the device.

    Samples are (source number, epoch, number in the source), as in `PackedBatch.sample_ids`; at most 64 in all.
    """
    finite = all(bool(torch.isfinite(loss)) for loss in result.losses.values())
    ids = [tuple(sample) for micro in batch.micro_batches for sample in micro.sample_ids.tolist()]
    found = gather_lists([(dist.get_rank(), finite, ids[: MAX_SUSPECTS if not finite else 4])])
    bad = [part for part in found if not part[1]]
    return {
        "ranks_with_bad_loss": [rank for rank, _, _ in bad],
        # Ranks that share rows have the same ones.
        "samples": [list(sample) for sample in dict.fromkeys(s for *_, samples in bad or found for s in samples)][
            :MAX_SUSPECTS
        ],
    }


def told_ranks(ranks: list[int]) -> str:
    return f" (the loss was not on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))})" if ranks else ""
