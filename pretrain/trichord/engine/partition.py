"""ZeRO-3 from the first moment: a model that is built in slices, and handed to DeepSpeed without ever being whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trichord.engine.config import EngineConfig
from trichord.layers.initial import OwnSlices, return_large_blocks


def slices_of_run(engine: EngineConfig) -> OwnSlices | None:
    """What to build the model in: slices at stage 3 on several ranks, unless `engine.zero_init` is off; else None."""
    if engine.zero_stage != 3 or dist.get_world_size() == 1 or not engine.zero_init:
        return None
    return OwnSlices(dist.get_rank(), dist.get_world_size())


def building_in(slices: OwnSlices | None) -> AbstractContextManager[Any]:
    """The context in which to build the model and to put released weights into it."""
    return contextlib.nullcontext() if slices is None else slices


def hand_over(model: nn.Module, slices: OwnSlices, deepspeed_json: dict[str, Any], dtype: torch.dtype) -> None:
    """Make DeepSpeed's partitioned parameters of a model that was built in slices.

    `deepspeed.zero.Init` in the building itself would not do: what a module does to its parameters after their
    partitioning (transformers, timm and we all do) meets empty tensors and draws no random numbers, so the weights
    would be others than those of a whole build; and it sends every parameter from rank 0 to all others.

    dtype: in which the engine computes; each rank's slice is rounded to it as the whole would be.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    class FromSlices(deepspeed.zero.Init):
        """Takes only this rank's slice from a parameter: the rest of its buffer is memory nobody has touched."""

        def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
            scratch = torch.empty(largest, dtype=dtype, device=self.local_device)
            for parameter in param_list:
                if is_zero_param(parameter):
                    continue
                if not slices.holds(parameter):  # made outside of any module's registration
                    parameter.data = parameter.data.to(dtype)
                    super()._convert_to_zero_parameters([parameter])
                    continue
                start, end = slices.share(parameter.numel())
                own = slices.take(parameter)
                whole = scratch[: parameter.numel()]
                if own is not None:
                    whole[start:end].copy_(own)
                parameter.data = whole.view(parameter.shape)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()

    largest = max(parameter.numel() for parameter in model.parameters())
    with return_large_blocks():
        FromSlices(module=model, config_dict_or_path=deepspeed_json, dtype=dtype)
