"""Convolutions and BatchNorms of a backbone that may be routed: dense ones, and ones with weights of its own for every
expert.

A routed batch is sorted by expert once, at the entrance of the network (`dispatch`), so that in every layer each
expert's images are one contiguous slice: nothing is gathered, masked or thrown away on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.mixing import is_undivided
from robustmoe.models.norm import BatchNorm2d, Foldable, enters_empty
from robustmoe.routing import Routing


class Handed:
    """What a pass hands down to every layer of a backbone beside the feature map; a layer that it is not meant for
    leaves it alone.
    """


@dataclass(frozen=True)
class Segments(Handed):
    """A batch sorted by expert: ``sizes`` images for each expert in turn, and each image's weight (n,), which is 1 in
    value.
    """

    sizes: list[int]
    weight: Float[Tensor, " n"]

    def through(self, modules: nn.ModuleList, x: Tensor, every: bool = False) -> Tensor:
        """Runs each expert's module on its slice of x (n, d, h, w); without images it is left out, unless ``every``."""
        used = [(module, size) for module, size in zip(modules, self.sizes, strict=True) if size or every]
        if len(used) < 2:  # an empty slice would cost the gradient its channels-last memory
            out: Tensor = (used[0][0] if used else modules[0])(x)
            return out
        parts = x.split([size for _, size in used])
        return torch.cat([module(part) for (module, _), part in zip(used, parts)])


def dispatch(
    function: Callable[[Tensor, Segments], Tensor],
    x: Float[Tensor, "n ..."],
    routing: Routing,
    weight: Float[Tensor, " n"],
    apart: bool,
) -> Float[Tensor, "n ..."]:
    """``function`` on the batch sorted by the expert of each image, its result in the batch's own order.

    ``apart``: one call an expert, on its slice alone, which then is a slim network of its own from end to end; right
    in eval mode, where no layer looks at the rest of the batch. Otherwise one call for all. Where it `is_undivided`,
    every expert runs on every image.
    """
    expert, experts = routing.index[:, 0, 0], routing.num_experts
    if is_undivided():
        alone = [[x.shape[0] if k == j else 0 for j in range(experts)] for k in range(experts)]
        every = torch.stack([function(x, Segments(own, weight)) for own in alone])
        return every[expert, torch.arange(x.shape[0], device=x.device)]
    sizes = routing.sizes()
    if max(sizes) == len(x):  # all to one expert, or no image at all
        return function(x, Segments(sizes, weight))
    order = torch.argsort(expert, stable=True)
    x, weight = x[order].contiguous(memory_format=torch.channels_last), weight[order]
    if apart:
        slices = zip(x.split(sizes), weight.split(sizes))
        alone = [[size if k == j else 0 for j in range(experts)] for k, size in enumerate(sizes)]
        out = torch.cat([function(part, Segments(own, w)) for (part, w), own in zip(slices, alone) if len(part)])
    else:
        out = function(x, Segments(sizes, weight))
    return out[torch.argsort(order)]


WIDEST_VECTOR = 16
"""Floats in the widest CPU register (AVX-512)."""


class Conv(Foldable, nn.Conv2d, foldable=True):
    """An ordinary convolution without bias, the same for every image.

    A 1x1 convolution with a stride and fewer input channels than a CPU vector has floats takes its pixels first and
    then has stride 1, which is the same function. oneDNN (as in torch 2.13) computes the gradient of such weights in
    channels-last memory wrong, or writes past a buffer and aborts the process (oneDNN issue 6035).

    ``same``: with a stride, TensorFlow's padding: as few zeros as a side needs, an odd number of them more at the end.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, same: bool = False) -> None:
        self.same = same and stride > 1
        super().__init__(inputs, outputs, kernel, stride, 0 if self.same else kernel // 2, bias=False)
        self.takes_pixels_first = kernel == 1 and stride > 1 and inputs < WIDEST_VECTOR

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return self.convolved(x, self.weight)

    def convolved(self, x: Float[Tensor, "n d h w"], weight: Float[Tensor, "f _ kh kw"], groups: int = 1) -> Tensor:
        """Returns the convolution with other filters than its own, at the same stride and padding."""
        x = F.pad(x, self._zeros(x)) if self.same else x
        if not self.takes_pixels_first:
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, groups)
        rows, columns = self.stride
        x = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, groups=groups)

    def _zeros(self, x: Tensor) -> tuple[int, int, int, int]:
        """Returns how many zeros TensorFlow's rule puts left, right, above and below."""
        steps = [(side, size, step) for side, size, step in zip(x.shape[2:], self.kernel_size, self.stride)]
        rows, columns = (max((-(-side // step) - 1) * step + size - side, 0) for side, size, step in steps)
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2

    def folded(self, scale: Float[Tensor, " d"], shift: Float[Tensor, " d"]) -> nn.Module:
        return fold(self, scale, shift)


class Norm(BatchNorm2d, foldable=True):
    """One BatchNorm for all experts: in train mode over the whole re-assembled batch (AdvMoE's)."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return super().forward(x)


class _RouteWeight(torch.autograd.Function):
    """``out`` times the route's weight (n,), which is 1 in value: nothing to compute forward. Backward, the weight's
    gradient is <dL/dout, out - shift> an image (``shift`` (d,): see `weighted`).
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(out, shift)
        ctx.dtype = weight.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        out, shift = ctx.saved_tensors
        whole = (grad * out).sum((1, 2, 3), dtype=ctx.dtype)
        if shift is not None:
            whole = whole - grad.sum((2, 3), dtype=ctx.dtype) @ shift.to(ctx.dtype)
        return grad, whole, None


def weighted(out: Float[Tensor, "n d h w"], weight: Float[Tensor, " n"], shift: Tensor | None = None) -> Tensor:
    """``out`` itself; backward, the route's weight gets <dL/dout, out> an image (<dL/dout, out - shift> with ``shift``
    (d,)).
    """
    if not weight.requires_grad:
        return out
    through: Tensor = _RouteWeight.apply(out, weight, shift)
    return through


class RoutedConv(Foldable, nn.Module, foldable=True):
    """One convolution an expert, equal in shape; expert k's images (n_k, d, h, w) go through expert k's filters
    alone.

    The route's weight, 1 in value, gets the straight-through gradient sum over layers of <dL/dh, h> (AdvMoE's released
    code; its filter banks are initialised each on its own here, not by the joint fan-out).
    """

    def __init__(self, experts: int, inputs: int, outputs: int, kernel: int, stride: int, same: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Conv(inputs, outputs, kernel, stride, same) for _ in range(experts))

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        if not isinstance(segments, Segments):
            raise ValueError("a routed convolution needs the batch's segments")
        return weighted(segments.through(self.experts, x), segments.weight)

    def folded(self, scale: Float[Tensor, " d"], shift: Float[Tensor, " d"]) -> nn.Module:
        for expert in self.experts:
            assert isinstance(expert, nn.Conv2d)
            fold(expert, scale, shift)
        return FoldedRoutedConv(self, shift)


def folded(layer: nn.Module, scale: Float[Tensor, " d"], shift: Float[Tensor, " d"]) -> nn.Module:
    """Returns a layer of convolutions and y = scale * x + shift behind it as one layer."""
    if isinstance(layer, Foldable):
        return layer.folded(scale, shift)
    assert isinstance(layer, nn.Conv2d)
    return fold(layer, scale, shift)


def fold(conv: nn.Conv2d, scale: Float[Tensor, " d"], shift: Float[Tensor, " d"]) -> nn.Conv2d:
    """Puts y = scale * x + shift, in float64, into the convolution before it, and returns that. Its former weights,
    which others may share, are left alone.
    """
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return conv


class FoldedRoutedConv(nn.Module):
    """A `RoutedConv` and the BatchNorm behind it as one: scale and shift are in each expert's filters and bias.

    The routed convolution multiplies its output h by the route's weight w, 1 in value, whose gradient is <dL/dh, h>.
    With the BatchNorm y = s h + t that is <s dL/dy, h> = <dL/dy, y - t>: the straight-through gradient stays what it
    was.
    """

    shift: Tensor

    def __init__(self, conv: RoutedConv, shift: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.experts = conv.experts
        self.register_buffer("shift", shift.to(next(conv.parameters())))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return weighted(segments.through(self.experts, x), segments.weight, self.shift)


class RoutedNorm(nn.Module):
    """One BatchNorm an expert (not AdvMoE's, which shares them): its statistics are of that expert's images alone."""

    def __init__(self, experts: int, channels: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(BatchNorm2d(channels) for _ in range(experts))

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        if not isinstance(segments, Segments):
            raise ValueError("a routed BatchNorm needs the batch's segments")
        return segments.through(self.experts, x, every=enters_empty(self))


@dataclass(frozen=True)
class Layers:
    """What a backbone is made of. ``conv``: (inputs, outputs, kernel, stride, same=False) -> a module called as
    conv(x, segments); ``norm``: (channels) -> one called as norm(x, segments); ``routed``: whether these have experts.
    """

    conv: Callable[..., nn.Module] = Conv
    norm: Callable[[int], nn.Module] = Norm
    routed: bool = False


DENSE = Layers()


def routed_layers(experts: int, own_norm: bool = False) -> Layers:
    """Layers with ``experts`` filter banks; BatchNorms shared, or one an expert."""
    return Layers(partial(RoutedConv, experts), partial(RoutedNorm, experts) if own_norm else Norm, routed=True)
