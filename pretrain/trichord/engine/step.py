"""One optimizer step over all micro-batches of a rank: counts first, then gradients, then the update.

Every loss is a local sum divided by the global count of the step, so the update does not depend on how the global
batch is split over ranks and micro-steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch
from trichord.core.phase import note
from trichord.engine.clock import StepClock
from trichord.engine.features import FeatureGradients, SlotLayout, features_of_step, gradients_of_step
from trichord.engine.label_losses import label_sums
from trichord.objectives.combine import micro_loss
from trichord.objectives.config import ObjectivesConfig
from trichord.objectives.next_token import divisor

# What the one count all-reduce of a step carries. labels: each as much as it weighs.
COUNT_NAMES: tuple[str, ...] = (
    *("labels", "useful_tokens", "slots", "samples", "bad_samples", "filtered", "open_lanes", "stop"),
)


def _content(batch: PackedBatch) -> dict[str, int]:
    """What a watcher tells of a micro-batch; host numbers."""
    own = batch.own
    images, clips = own.count(own.images.items), own.count(own.audios.items)
    return {"tokens": own.count(own.tokens), "useful": own.useful_tokens, "images": images, "clips": clips}


@dataclass
class StepResult:
    """What one step did, equal on all ranks unless said otherwise.

    counts: name -> global number; losses: name -> () tensors on the device, this rank's share of each loss (their sum
    over ranks is the loss); grad_norm: before clipping; skipped: the update was not applied (non-finite);
    label_sums: this rank's losses by source and kind of sample (see `label_losses`), on the device; None where there is
    no next-token objective or no source was named. A step without a sample on any rank computes nothing and changes
    nothing: it has no losses.
    """

    counts: dict[str, float]
    losses: dict[str, Tensor]
    grad_norm: float
    skipped: bool
    label_sums: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """No rank had a sample."""
        return not self.counts["useful_tokens"]


class Stepper:
    """Runs optimizer steps of one engine. Holds what does not change from step to step."""

    def __init__(
        self,
        engine: Any,
        objectives: ObjectivesConfig,
        *,
        device: torch.device,
        layout: SlotLayout,
        max_grad_norm: float,
        clock: StepClock | None = None,
        num_sources: int = 0,
    ):
        """clock: where the parts of a step are timed; num_sources: of the data, for losses by source; 0: without."""
        self.clock = clock or StepClock(device)
        self.num_sources = num_sources
        self.engine = engine
        self.objectives = objectives
        self.device = device
        self.layout = layout
        self.max_grad_norm = max_grad_norm
        self.world_size = dist.get_world_size()
        self.zero_stage = engine.zero_optimization_stage()

    def run(self, micro_batches: Sequence[PackedBatch], local_counts: dict[str, float]) -> StepResult:
        """One step. `local_counts` has this rank's `samples`, `bad_samples`, `filtered`, `open_lanes` and `stop`; what
        it lacks is 0, and the rest is counted.

        The stop flag travels with the counts: when the returned count `stop` is above 0, every rank knows it at the
        same step.
        """
        note(micro_batches=[_content(batch) for batch in micro_batches])
        self.clock.enter("count")
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = self._global_counts(batches, local_counts)
        if not any(batch.own.useful_tokens for batch in batches):  # only such a rank has to read the sums to know
            values = dict(zip(COUNT_NAMES, counts.tolist()))
            if not values["useful_tokens"]:  # then all ranks are here
                return StepResult(values, {}, 0.0, skipped=False)
        gradients, first_output = self._feature_gradients(batches)
        losses, label_sums = self._accumulate(batches, counts[0], gradients, first_output)
        self.clock.enter("update")
        grad_norm, skipped = self._update()
        values = dict(zip(COUNT_NAMES, counts.tolist()))
        return StepResult(values, losses, grad_norm, skipped, label_sums)

    def _global_counts(self, batches: Sequence[PackedBatch], local_counts: dict[str, float]) -> Tensor:
        """(len(COUNT_NAMES),) fp32 on the device, summed over ranks. Exact up to 2^24 of each per step."""
        parts = [batch.own for batch in batches]
        own = {
            **dict.fromkeys(COUNT_NAMES, 0.0),
            "labels": sum(batch.label_weight for batch in batches),
            "useful_tokens": sum(own.useful_tokens for own in parts),
            "slots": sum(own.count(own.tokens) for own in parts),
            **local_counts,
        }
        counts = torch.tensor([float(own[name]) for name in COUNT_NAMES], dtype=torch.float64).to(self.device)
        dist.all_reduce(counts)
        return counts

    def _feature_gradients(
        self, batches: Sequence[PackedBatch]
    ) -> tuple[FeatureGradients | None, dict[str, Tensor] | None]:
        """Gradients of the contrastive loss by feature, and, with one micro-batch, the forward pass already made."""
        if self.objectives.contrastive is None:
            return None, None
        if len(batches) == 1:  # nothing to accumulate over: the pass that keeps its graph serves both
            self.clock.enter("forward", micro_step=0)
            output = self.engine(batches[0])
            self.clock.enter("contrast")
            features = features_of_step([output], batches, self.layout)
            return gradients_of_step(self.objectives.contrastive, features, output, self.layout), output
        outputs = []
        with torch.no_grad():
            for number, batch in enumerate(batches):
                self.clock.enter("features", micro_step=number)
                outputs.append(self.engine(batch, towers_only=True))
        self.clock.enter("contrast")
        features = features_of_step(outputs, batches, self.layout)
        return gradients_of_step(self.objectives.contrastive, features, outputs[0], self.layout), None

    def _accumulate(
        self,
        batches: Sequence[PackedBatch],
        global_labels: Tensor,
        gradients: FeatureGradients | None,
        first_output: dict[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Forward and backward of every micro-batch; this rank's share of each loss, detached, and their split."""
        losses = dict(gradients.losses) if gradients is not None else {}
        label_loss = torch.zeros((), dtype=torch.float32, device=self.device)
        split: Tensor | None = None
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            self.clock.enter("forward", micro_step=number)
            output = first_output if first_output is not None else self.engine(batch)
            grads = gradients.of_micro_batch(number, batch) if gradients is not None else {}
            loss = micro_loss(self.objectives, output, global_labels, grads, self.world_size, len(batches))
            self.clock.enter("backward", micro_step=number)
            self.engine.backward(loss, scale_wrt_gas=False)
            if self.objectives.next_token is not None:
                label_loss = label_loss + output["next_token_loss_sum"].detach()
            if self.num_sources and "next_token_losses" in output:
                sums = label_sums(batch, output["next_token_losses"], self.num_sources)
                split = sums if split is None else split + sums
        if self.objectives.next_token is not None:
            losses["next_token"] = label_loss / divisor(global_labels)
        return losses, split

    def _update(self) -> tuple[float, bool]:
        """Clip, step, and take the new weights into their average. The one host read of a step is the gradient norm."""
        if self.zero_stage == 0:
            norm, skipped = self._update_stage_0()
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            skipped = not self.engine.was_step_applied()
        if self.engine.weight_average is not None and not skipped:
            self.engine.weight_average.update()
        return norm, skipped

    def _update_stage_0(self) -> tuple[float, bool]:
        parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if norm != norm or norm in (float("inf"), float("-inf")):
            # DeepSpeed checks for overflow from stage 1 on; here the step is ours to skip.
            self.engine.zero_grad()
            return norm, True
        self.engine.step()
        return norm, False


def restart_loss_scale(engine: Any) -> None:
    """fp16: the scale that skipped steps have lowered is what a process begins with. Others have none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.__init__(dtype=scaler.dtype, **engine.dynamic_loss_scale_args())
