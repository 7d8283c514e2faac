"""BatchNorm that is right for experts (any number of images, none included) and over several processes; input
normalisation.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from robustmoe import distributed


def at_least_float32(x: Tensor) -> Tensor:
    """Float32 at least: under autocast a network's outputs are in half precision, decisions, statistics and losses are
    not.
    """
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def answers(logits: Float[Tensor, "n c"]) -> Bool[Tensor, " n"]:
    """Returns which rows name a class: no NaN, none that is +inf, one that is finite. A class at -inf is masked by the
    model: it is never chosen.
    """
    return (logits < torch.inf).all(1) & logits.isfinite().any(1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Returns |a - b|, which is 0 also where both are -inf."""
    return torch.where(a == b, torch.zeros_like(a), (a - b).abs())


def largest(values: Tensor) -> Tensor:
    """Returns the largest absolute value, -inf (a class that is masked) left out."""
    return values.abs().masked_fill(values == -torch.inf, 0.0).max()


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which autocast is off on the device of x: none, where it is off already."""
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def unit_length(x: Tensor, eps: float, dim: int = -1) -> Tensor:
    """Returns x / sqrt(|x|^2 + eps), |x| its length along ``dim``: as one function of torch's kind, so that bounds know
    it (`robustmoe.certification`).
    """
    if has_torch_function_unary(x):
        unit: Tensor = handle_torch_function(unit_length, (x,), x, eps, dim)
        return unit
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps)


class Foldable:
    """A layer class that says whether a frozen copy may fold it: a BatchNorm into the convolution before it.

    ``foldable`` promises that, in eval mode, the layer computes what torch's BatchNorm or convolution computes with the
    same parameters. Each class makes the promise for itself, ``class Mine(Conv, foldable=True)``; no subclass inherits
    it.
    """

    foldable: ClassVar[bool] = False

    def __init_subclass__(cls, foldable: bool = False, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.foldable = foldable

    def folded(self, scale: Float[Tensor, " d"], shift: Float[Tensor, " d"]) -> nn.Module:
        """Returns a convolution's layer and y = scale * x + shift behind it as one layer, which may be this one,
        changed.
        """
        raise TypeError(f"{type(self).__name__} is no convolution, so no BatchNorm can become part of it")


class Normalise(nn.Module):
    """(x - mean) / std per channel, inside the model, so that every radius and every attack is in pixels of [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need one value a channel, std above 0; got mean {mean}, std {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n ch h w"]:
        return (x - self.mean) / self.std


class BatchNorm2d(Foldable, nn.BatchNorm2d, foldable=True):
    """`torch.nn.BatchNorm2d`, with three differences while training.

    An empty batch passes through and leaves the statistics alone. A single value a channel is allowed (its variance
    is 0, and the running variance is left alone): an expert that got one image must not stop a run. Under several
    processes the statistics are those of the global batch (torch's SyncBatchNorm exists for CUDA only), and every
    process has to enter, with an empty batch if need be.
    """

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
        return self.scaled(x, self.weight, self.bias)

    def unit(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
        """Returns x with mean 0 and variance 1 a channel, without the scale and the shift."""
        return self.scaled(x, None, None)

    def scaled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Returns x normalised, times ``weight`` plus ``bias`` in the place of its own."""
        running, rate = self.running_mean is not None, 0.0
        if self.training:
            values = x.numel() // x.shape[1]
            if distributed.active() or values == 1:
                return self._global(x, weight, bias)
            if not values:
                return x
            if running and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                rate = self._rate()
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training or not running, rate, self.eps
        )

    @torch.no_grad()
    def statistics(self, x: Float[Tensor, "n d h w"]) -> tuple[Tensor, Tensor] | None:
        """Returns the mean and the variance that x is normalised by: the running ones, or in train mode those of x,
        which the running ones then follow. None where they are not x's alone, or not of this layer's keeping.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return None
        if not self.training:
            return self.running_mean, self.running_var
        if distributed.active() or x.numel() <= x.shape[1]:
            return None
        self.num_batches_tracked += 1
        mean, var = torch.batch_norm_update_stats(x, self.running_mean, self.running_var, self._rate())
        return mean, var

    def _global(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        out, mean, var, count = _GlobalBatchNorm.apply(x, weight, bias, self.eps)
        self._update(mean, var, count)
        return out

    def _rate(self) -> float:
        """Returns the share of the newest batch in the running statistics."""
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Running statistics, as torch's own layer keeps them (unbiased variance). How many values a channel had
        (``count``, a scalar) is not asked for: on a device that would wait.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += count > 0
        rate, old = self._rate(), self.running_mean
        old.copy_(torch.where(count > 0, old.lerp(mean.to(old.dtype), rate), old))
        unbiased, old = var * count / (count - 1).clamp(min=1), self.running_var
        old.copy_(torch.where(count > 1, old.lerp(unbiased.to(old.dtype), rate), old))


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of all processes' images together (Ioffe and Szegedy 2015, with sums over
    processes).

    Mean first, then variance about it: two small collectives, no cancellation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = at_least_float32(x)
        total = torch.cat([values.sum((0, 2, 3)), values.new_full((1,), values.numel() // values.shape[1])])
        distributed.all_reduce_sum(total)
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        centred = values - mean[:, None, None]
        var = distributed.all_reduce_sum(centred.square().sum((0, 2, 3))) / count
        inverse = torch.rsqrt(var + eps)
        unit = centred * inverse[:, None, None]
        ctx.save_for_backward(unit, weight, inverse, count)
        out = (unit * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
        values_a_channel = total[-1].clone()
        ctx.mark_non_differentiable(mean, var, values_a_channel)
        return out, mean, var, values_a_channel

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        unit, weight, inverse, count = ctx.saved_tensors
        above = grad.to(unit.dtype)
        grad_bias = above.sum((0, 2, 3))
        grad_weight = (above * unit).sum((0, 2, 3))
        sums = distributed.all_reduce_sum(torch.stack([grad_bias, grad_weight])) / count
        centred = above - sums[0][:, None, None] - unit * sums[1][:, None, None]
        return (
            (centred * (weight * inverse)[:, None, None]).to(grad.dtype),
            grad_weight,
            grad_bias,
            None,
        )


def enters_empty(module: nn.Module) -> bool:
    """Returns whether the module must be called even without images: its BatchNorm counts over processes, and all of
    them have to enter.
    """
    return module.training and distributed.active()


class Standardise(nn.Module):
    """Router logits (n, e) with mean 0 and variance 1 an expert: over the (global) batch in train mode, by running
    statistics in eval mode.

    A fresh router sends nearly every image to one expert, because its logits hardly depend on the image;
    standardised, each expert gets a share from the first step. In eval mode this is a fixed affine map, so decisions
    do not depend on the batch. Not part of AdvMoE.
    """

    def __init__(self, network: nn.Module, experts: int) -> None:
        super().__init__()
        self.network = network
        self.norm = BatchNorm2d(experts, affine=False)

    def forward(self, x: Tensor) -> Float[Tensor, "n e"]:
        logits = self.network(x)
        return self.norm(at_least_float32(logits)[:, :, None, None])[:, :, 0, 0]
