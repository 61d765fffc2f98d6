"""Batch normalisation over the items of all ranks: y = (x - mean) / sqrt(var + eps) * weight + bias.

In training, mean and var are those of all real items of this micro-step, whichever rank holds them: one all-reduce
forwards, one backwards. A rank without items joins both with its placeholder, which adds nothing. So the result does
not depend on how a micro-step is split over ranks; it does depend on what else is in the micro-step.

Shapes: I items, C channels, H x W pixels of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trichord.core.errors import ConfigError


@dataclass
class BatchItems:
    """What the norms of one tower know of the call that they are part of.

    frozen: the stored statistics serve in training too; num_real: the first so many items are real, the rest is
    placeholders; None: all are; recording: the tower's own forward pass is running, not its recomputation.
    """

    frozen: bool
    num_real: int | None = None
    recording: bool = False

    @contextmanager
    def of_call(self, num_real: int | None) -> Iterator[None]:
        """Around the forward pass of the tower. num_real stays afterwards, for recomputation in the backward pass."""
        self.num_real, self.recording = num_real, True
        try:
            yield
        finally:
            self.recording = False


class _Moments(NamedTuple):
    """mean, var, rstd (C,) fp32; count () fp64: values per channel on all ranks, 0 where no rank has an item."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    count: Tensor


class _Normalise(torch.autograd.Function):
    """y from x and the moments of the real items of all ranks, which are functions of x themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: _Moments, num_real: int) -> Tensor:
        ctx.save_for_backward(x, weight, moments.mean, moments.rstd, moments.count)
        ctx.num_real, ctx.bias_dtype = num_real, bias.dtype
        return _scale_and_shift(x, weight, bias, moments.mean, moments.rstd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dx = w * rstd * (dy - mean(dy) - x^ * mean(dy * x^)), the means over all ranks' real items.

        A placeholder, on which the moments do not depend, gets the first term alone.
        """
        x, weight, mean, rstd, count = ctx.saved_tensors
        centred = (x.float() - _channels(mean)) * _channels(rstd)
        dy = gradient.float()
        sums = torch.stack([dy.sum((0, 2, 3)), (dy * centred).sum((0, 2, 3))])
        means = sums.double()
        _sum_over_ranks(means)
        from_mean, from_var = (means / count.clamp(min=1.0)).float().unbind()
        dx, real = dy.clone(), slice(0, ctx.num_real)
        dx[real] -= _channels(from_mean) + centred[real] * _channels(from_var)
        dx *= _channels(rstd * weight.float())
        return dx.to(x.dtype), sums[1].to(weight.dtype), sums[0].to(ctx.bias_dtype), None, None


class SharedBatchNorm(nn.Module):
    """torch's or timm's `BatchNorm2d` around the same Parameters, statistics and activation; see the module's
    docstring.

    The running statistics are equal on all ranks. They are moved once per forward pass that keeps its graph: neither
    in a pass without gradients (the first of two of a contrastive step) nor in recomputation, and not by numbers that
    are not finite (such a step is skipped). They stay fp32 when the module is cast.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, old: Any, items: BatchItems):
        super().__init__()
        self.weight, self.bias = old.weight, old.bias
        self.register_buffer("running_mean", old.running_mean)
        self.register_buffer("running_var", old.running_var)
        self.eps, self.momentum = float(old.eps), float(old.momentum)
        self.drop, self.act = getattr(old, "drop", nn.Identity()), getattr(old, "act", nn.Identity())
        self.items = items
        self._last: _Moments | None = None
        self.train(old.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (I, C, H, W) -> the same shape."""
        if self.training and not self.items.frozen:
            return self.act(self.drop(self._normalise(x)))  # pyright: ignore  the type of a decorated method is lost
        rstd = (self.running_var + self.eps).rsqrt()
        return self.act(self.drop(_scale_and_shift(x, self.weight, self.bias, self.running_mean, rstd)))

    @torch.compiler.disable  # collectives and the host's numbers
    def _normalise(self, x: Tensor) -> Tensor:
        num_real = x.shape[0] if self.items.num_real is None else self.items.num_real
        if self.items.recording or self._last is None:
            self._last = self._moments(x.detach(), num_real)
            if self.items.recording and torch.is_grad_enabled():
                self._move_statistics(self._last)
        return _Normalise.apply(x, self.weight, self.bias, self._last, num_real)

    @torch.no_grad()
    def _moments(self, x: Tensor, num_real: int) -> _Moments:
        """Each rank's moments in fp32, put together in fp64, where sums of squares lose nothing; one all-reduce."""
        channels = x.shape[1]
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if num_real:
            own_var, own_mean = torch.var_mean(x[:num_real].float(), dim=(0, 2, 3), correction=0)
            own_var, own_mean = own_var.double(), own_mean.double()
            own_count = num_real * x.shape[2] * x.shape[3]
            sums[:channels] = own_mean * own_count
            sums[channels:-1] = (own_var + own_mean.square()) * own_count
            sums[-1] = own_count
        _sum_over_ranks(sums)
        count = sums[-1]
        first, second = (sums[:-1] / count.clamp(min=1.0)).split(channels)
        there = count > 0
        mean = torch.where(there, first.float(), self.running_mean)
        var = torch.where(there, (second - first.square()).clamp(min=0.0).float(), self.running_var)
        return _Moments(mean, var, (var + self.eps).rsqrt(), count)

    @torch.no_grad()
    def _move_statistics(self, moments: _Moments) -> None:
        unbiased = moments.var * (moments.count / (moments.count - 1.0).clamp(min=1.0)).float()
        usable = (moments.count > 0) & torch.isfinite(moments.mean).all() & torch.isfinite(unbiased).all()
        for running, new in ((self.running_mean, moments.mean), (self.running_var, unbiased)):
            running.copy_(torch.where(usable, torch.lerp(running, new, self.momentum), running))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedBatchNorm:
        """Engines cast whole models; rounded statistics would stop moving."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._last = None
        return self


def share_batch_norms(model: nn.Module, frozen: bool) -> BatchItems | None:
    """Put a `SharedBatchNorm` in the place of every batch norm of `model`.

    frozen: normalise by the stored statistics in training too.

    Returns:
        What its forward pass has to tell the norms; None where there are none.

    Raises:
        ConfigError: statistics of batches that we do not know how to share.
    """
    items = BatchItems(frozen)
    found = False
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm) and not hasattr(child, "running_var"):
                continue
            _require_known(child, f"{parent_name}.{name}".lstrip("."))
            setattr(parent, name, SharedBatchNorm(child, items))
            found = True
    return items if found else None


def has_shared_statistics(model: nn.Module) -> bool:
    """Whether any norm of the model computes statistics over a micro-step in training."""
    return any(isinstance(module, SharedBatchNorm) and not module.items.frozen for module in model.modules())


def _require_known(norm: Any, name: str) -> None:
    known = type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d"
    if known and norm.affine and norm.track_running_stats and norm.momentum is not None:
        return
    raise ConfigError(
        f"{name} ({type(norm).__name__}) keeps statistics of batches in a way that cannot be shared over ranks; "
        "expected torch's BatchNorm2d or timm's BatchNormAct2d with weights, running statistics and a momentum: choose "
        "another model, or another norm_layer in its options"
    )


def _scale_and_shift(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    scale, shift = _channels(weight.float() * rstd), _channels(bias.float())
    return ((x.float() - _channels(mean)) * scale + shift).to(x.dtype)


def _channels(values: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1)."""
    return values[:, None, None]


def _sum_over_ranks(values: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
